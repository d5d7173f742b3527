"""Who is compared, in the order of the table."""

from trainer.data.bench.contestant import Contestant
from trainer.data.bench.contestants import hf_datasets, litdata, megatron, memmap, ours, streaming, webdataset

CONTESTANTS: dict[str, Contestant] = {
    one.name: one
    for one in (
        ours.OURS, memmap.MEMMAP, webdataset.MANY, webdataset.SINGLE, litdata.LITDATA, hf_datasets.MAPPED,
        megatron.MEGATRON, streaming.STREAMING,
    )
}  # fmt: skip
