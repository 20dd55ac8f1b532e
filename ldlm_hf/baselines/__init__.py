"""Methods to compare with, one a file: process, loss, sampler and recipe side by side.

`masked` (MDLM, ReMDM), `uniform` (Duo, psi-samplers, its distillation), `candi`, `flow_language_model` (FLM, FMLM) and
`autoregressive`. All but the last share a network (`token_transformer`), a pipeline (`pipeline_token_diffusion`), the
base of their samplers (`token_scheduler`) and of their training (`token_training`). What several methods need of
mathematics is in `categorical`, `noise_schedule` and `one_hot_noise`.

A new one is a file here, one line in `_MODULES` of the package, which names what others may import, and one in
`training/train_baseline.py`; a new sampler is named in `TOKEN_SCHEDULERS`, too.
"""
