"""Methods to compare with, one a file: process, loss, sampler and recipe side by side.

`masked` (MDLM, ReMDM), `uniform` (Duo, psi-samplers, its distillation), `candi`, `flow_language_model` (FLM, FMLM) and
`autoregressive`. All but the last share a network (`token_transformer`), a pipeline (`pipeline_token_diffusion`), the
base of their samplers (`token_scheduler`) and of their training (`token_training`). What several methods need of
mathematics is in `categorical`, `noise_schedule` and `one_hot_noise`.

A new method is a file here and a line in `recipes.RECIPES`; a new sampler is a line in `schedulers.TOKEN_SCHEDULERS`.
"""
