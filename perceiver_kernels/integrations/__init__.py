"""Other people's models on these kernels: layers replaced in place, attention functions of torch and transformers."""

from perceiver_kernels.integrations.replacement import replace_attention
from perceiver_kernels.integrations.report import Entry, Report
from perceiver_kernels.integrations.sdpa import SDPACalls, sdpa_override

__all__ = ["Entry", "Report", "SDPACalls", "replace_attention", "sdpa_override"]
