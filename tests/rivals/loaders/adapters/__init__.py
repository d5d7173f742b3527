"""The loaders, in the order of the table."""

from tests.rivals.loaders.adapter import LoaderAdapter
from tests.rivals.loaders.adapters import (
    hf_datasets,
    litdata,
    megatron,
    memmap,
    streaming,
    tandem,
    webdataset,
)

ADAPTERS: dict[str, LoaderAdapter] = {
    one.name: one
    for one in (
        tandem.TANDEM,
        tandem.TANDEM_ROW_BLOCKS,
        memmap.MEMMAP,
        webdataset.WEBDATASET_MULTI_ROW,
        webdataset.WEBDATASET_SINGLE_ROW,
        litdata.LITDATA,
        hf_datasets.HF_DATASETS,
        megatron.MEGATRON,
        streaming.STREAMING,
    )
}
