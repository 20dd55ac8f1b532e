"""Text corpora → one token stream → chunks of L tokens (MDLM's protocol, App. C), or chunks of one document or pair.

Shapes: L tokens a chunk. An item is `{"input_ids": int64 tensor (L,)}`; a `DataLoader` over it gives (B, L). Of a
corpus of pairs, it also has `"given"`, bool (L,): True for the source, False for the target.

    corpora = load_corpora(DataSettings(source="corpus.txt.gz", holdout_fraction=0.1), tokenizer, sequence_length=128)
    corpora.train[0]["input_ids"]

A corpus larger than the disk is read with `streaming=True`: `corpora.train` is then an endless iterator, shared out by
rank and worker, and its `state_dict()` is the position that it goes on from.

In a distributed run let one process build the cache (`with accelerator.main_process_first(): load_corpora(...)`).
Processes that build it at the same time do the work twice but cannot damage it: files are renamed into place.

**The paper's corpora on the Hub.** datasets ≥ 4 runs no loading scripts, so the id must serve plain files. None of
these was downloaded here.

* OpenWebText: `source: Skylion007/openwebtext`, text column `text`, one split `train`, 8,013,769 documents. Where its
  `main` is still a script, `revision: refs/convert/parquet` names the Hub's own parquet conversion, and
  `dylanebert/openwebtext` is a converted copy. Validation is its last 100,000 documents: `holdout_documents: 100000`.
* LM1B: `source: billion-word-benchmark/lm1b` with `revision: refs/convert/parquet`, since `main` is a script; or a
  conversion, `dvruette/lm1b` or `FrankCCCCC/lm1b` (30,301,028 train and 306,688 test sentences). All need
  `detokenizer: lm1b`; the test split validates: `validation_split: test`.
"""

from __future__ import annotations

from .chunks import TokenChunks
from .corpora import TextCorpora, load_corpora, load_held_out
from .detokenizers import DETOKENIZERS, detokenize_lm1b
from .settings import DataSettings
from .streaming import StreamedTokenChunks


__all__ = [
    "DETOKENIZERS",
    "DataSettings",
    "StreamedTokenChunks",
    "TextCorpora",
    "TokenChunks",
    "detokenize_lm1b",
    "load_corpora",
    "load_held_out",
]
