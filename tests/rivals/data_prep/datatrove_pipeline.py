"""datatrove's reader and tokenizer in its local executor, one task per worker.

python -m tests.rivals.data_prep.datatrove_pipeline TOKENIZER OUTPUT WORKERS FOLDER
"""

import sys

from tests.rivals.data_prep.tokenizer_libraries import EOS


def main(arguments: list[str]) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    tokenizer, output, workers, folder = arguments
    LocalPipelineExecutor(
        [
            JsonlReader(folder, glob_pattern="*.jsonl.zst"),
            DocumentTokenizer(f"{output}/ids", tokenizer, eos_token=EOS, save_filename="corpus"),
        ],
        tasks=int(workers), workers=int(workers), logging_dir=f"{output}/logs",
    ).run()  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
