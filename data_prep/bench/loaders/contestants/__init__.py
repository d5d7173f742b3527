"""Who is compared, in the order of the table."""

from tandem.data_prep.bench.loaders.contestant import Contestant
from tandem.data_prep.bench.loaders.contestants import (
    hf_datasets,
    litdata,
    megatron,
    memmap,
    ours,
    streaming,
    webdataset,
)

CONTESTANTS: dict[str, Contestant] = {
    one.name: one
    for one in (
        ours.OURS, ours.FINE, memmap.MEMMAP, webdataset.MANY, webdataset.SINGLE, litdata.LITDATA, hf_datasets.MAPPED,
        megatron.MEGATRON, streaming.STREAMING,
    )
}  # fmt: skip
