"""Noise processes and samplers, as diffusers schedulers on the tangent schedule.

A new solver is one file with a subclass of `TangentScheduler`, and one line in `SCHEDULERS`, which registers and
exports it, lets pipelines load it, and makes it known to the command line. `TOKEN_SCHEDULERS` does that for others.
"""

from __future__ import annotations


# class → module of this package
SCHEDULERS = {
    "TangentEulerMaruyamaScheduler": "scheduling_tangent_euler_maruyama",
    "TangentDDIMScheduler": "scheduling_tangent_ddim",
    "TangentDPMSolverMultistepScheduler": "scheduling_tangent_dpmsolver_multistep",
    "TangentChurnScheduler": "scheduling_tangent_churn",
    "TangentFlowMapScheduler": "scheduling_tangent_flow_map",
}

# those of diffusers that `diffusers_config` puts on the tangent schedule
DIFFUSERS_SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")

# samplers of the methods that LDLM is compared with: class → module of the folder `baselines`
TOKEN_SCHEDULERS = {
    "MDLMScheduler": "masked",
    "ReMDMScheduler": "masked",
    "DuoScheduler": "uniform",
    "PsiScheduler": "uniform",
    "CANDIScheduler": "candi",
    "FLMScheduler": "flow_language_model",
    "FMLMScheduler": "flow_language_model",
}
