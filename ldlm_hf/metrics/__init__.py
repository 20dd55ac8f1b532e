"""How generated text is measured (App. E).

Each metric is a function in a module of its own, such as `token_entropy.token_entropy`, and in the same module a class
of `evaluate` around it: `evaluate.load("PATH/ldlm_hf/metrics/token_entropy.py")` and `TokenEntropy()` are the same.
Perplexity, MAUVE and latent smoothness read texts and need a judge, a pretrained causal language model; entropy,
n-gram diversity and repetition read the generator's token ids and need none; ROUGE-L and BERTScore compare each text
with one reference. Every result carries the size of its
set, because diversity and MAUVE mean nothing without it. `registry.SCORES` lists what evaluations measure of a set.
"""

from ldlm_hf.metrics.bert_score import BertScore
from ldlm_hf.metrics.generative_perplexity import GenerativePerplexity
from ldlm_hf.metrics.judge import Judge, load_judge
from ldlm_hf.metrics.latent_smoothness import LatentSmoothness
from ldlm_hf.metrics.mauve import Mauve, text_features
from ldlm_hf.metrics.ngram_diversity import NGramDiversity
from ldlm_hf.metrics.repetition import Repetition
from ldlm_hf.metrics.rouge_l import RougeL
from ldlm_hf.metrics.token_entropy import TokenEntropy


__all__ = [
    "BertScore",
    "GenerativePerplexity",
    "Judge",
    "LatentSmoothness",
    "Mauve",
    "NGramDiversity",
    "Repetition",
    "RougeL",
    "TokenEntropy",
    "load_judge",
    "text_features",
]
