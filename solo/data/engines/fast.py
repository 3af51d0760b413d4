"""The fast engine: `SmallEngine` for images that fit in memory and in a processor's cache, `LargeEngine` for all others."""

from solo.data.engines import ENGINES, Engine, Job
from solo.data.engines.large import LargeEngine
from solo.data.engines.small import SmallEngine
from solo.data.sources import ArraySource

MAX_SIZE = 64  # pixels on a side; above, workers that only decode and crop do less work than a chain over whole images


@ENGINES.register("fast")
def fast(job: Job) -> Engine:
    """The side of the engine that serves the images of this job."""
    source = job.source
    small = isinstance(source, ArraySource) and max(source.images.shape[1:3]) <= MAX_SIZE
    return SmallEngine(job) if small else LargeEngine(job)
