"""How generated text is measured (App. E), as `evaluate` metrics.

Each metric has a module of its own, so that `evaluate.load("PATH/ldlm_hf/metrics/token_entropy.py")` gives the same
metric as `TokenEntropy()`. `GenerativePerplexity`, `Mauve` and `LatentSmoothness` read texts and need a judge, a
pretrained causal language model; `TokenEntropy` and `NGramDiversity` read the generator's token ids and need none.
Every result carries the size of its set, because diversity and MAUVE mean nothing without it.
"""

from ldlm_hf.metrics.generative_perplexity import GenerativePerplexity
from ldlm_hf.metrics.judge import Judge, load_judge
from ldlm_hf.metrics.latent_smoothness import LatentSmoothness
from ldlm_hf.metrics.mauve import Mauve, text_features
from ldlm_hf.metrics.ngram_diversity import NGramDiversity
from ldlm_hf.metrics.token_entropy import TokenEntropy


__all__ = [
    "GenerativePerplexity",
    "Judge",
    "LatentSmoothness",
    "Mauve",
    "NGramDiversity",
    "TokenEntropy",
    "load_judge",
    "text_features",
]
