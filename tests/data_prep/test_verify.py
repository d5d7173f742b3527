import shutil

import numpy as np
import pytest

from trainer.config import UserError


def test_verify_passes_what_was_prepared_and_finds_a_flipped_bit_anywhere(prepared, folder, verified):
    output = prepared("out", "--input", folder)
    verified(output)
    rng = np.random.default_rng(0)
    for path in sorted(output.iterdir()):
        content = bytearray(path.read_bytes())
        for place in {0, len(content) - 2, *rng.integers(0, len(content), 3).tolist()}:
            damaged = content.copy()
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"manifest.json|" + path.name):
                verified(output)
        path.write_bytes(content)
    shutil.copy(output / "train-000000.tar", output / "train-999999.tar")
    with pytest.raises(UserError, match=r"train-999999.tar: is not in manifest.json"):
        verified(output)
