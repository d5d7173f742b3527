"""Who is compared, in the order of the table."""

from tandem.data_prep.bench.loaders.adapter import Contestant
from tandem.data_prep.bench.loaders.adapters import (
    hf_datasets,
    litdata,
    megatron,
    memmap,
    streaming,
    tandem,
    webdataset,
)

CONTESTANTS: dict[str, Contestant] = {
    one.name: one
    for one in (
        tandem.OURS, tandem.FINE, memmap.MEMMAP, webdataset.MANY, webdataset.SINGLE, litdata.LITDATA, hf_datasets.MAPPED,
        megatron.MEGATRON, streaming.STREAMING,
    )
}  # fmt: skip
