"""What ranks need, imported once, in the server whose forks they are (see `ranks.py`).

Of a parent's threads a fork has none, and what the parent has begun all worlds would share: nothing here starts a
thread or a process group, or computes.
"""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # else numpy starts threads

from tests.ranks import check_annotations

check_annotations()

import deepspeed.comm.mori  # noqa: E402
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.ops  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402
import pytest  # noqa: E402, F401
import rich._emoji_codes  # noqa: E402, F401
import torch  # noqa: E402
import torch.profiler._cupti_monitor  # noqa: E402
import transformers  # noqa: E402, F401

import tandem.data_prep.tokenizers.encoding  # noqa: E402  (not tandem.data_prep.prepare: pyarrow starts a thread)
import tandem.trainer.__main__  # noqa: E402
import tandem.trainer.models.sampling  # noqa: E402
import tandem.trainer.tools.convert_hf.conversion  # noqa: E402
import tandem.trainer.tools.convert_hf.export_check  # noqa: E402
import tandem.trainer.tools.generate  # noqa: E402
import tandem.trainer.train  # noqa: E402, F401

# DeepSpeed's engine imports the modules above and probes the compiler for its operators: a quarter of what a short run costs.
deepspeed.ops.__compatible_ops__  # noqa: B018
torch.set_num_threads(1)
SERVER_PID = os.getpid()
"""The one that imported this: in a fork, its server."""
gc.collect()
gc.freeze()  # DeepSpeed's bf16 optimizer collects garbage eight times; and a page that nobody writes to stays shared
