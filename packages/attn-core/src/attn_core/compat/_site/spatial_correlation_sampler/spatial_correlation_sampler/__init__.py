"""spatial_correlation_sampler over attn_core."""

from attn_core.compat.shims.correlation import SpatialCorrelationSampler, spatial_correlation_sample

__version__ = "0.5.0+attn_core"

__attn_core_compat__ = True

__all__ = ["SpatialCorrelationSampler", "spatial_correlation_sample"]
