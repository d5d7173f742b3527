"""Standard output that is a result, not a view."""

import io
import os
from concurrent.futures import ThreadPoolExecutor

from tandem.trainer.runtime.streams import StandardStream


def test_a_result_waits_for_the_reader_of_a_pipe_that_another_program_made_non_blocking():
    result = os.urandom(1 << 20)  # more than a pipe holds
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with ThreadPoolExecutor() as pool, open(reader, "rb") as pipe:
        read = pool.submit(pipe.read)
        with open(writer, "wb", buffering=0), io.BufferedWriter(StandardStream(writer, is_view=False)) as output:
            output.write(result)
        assert read.result() == result
