"""The data of scale.py as one small file, for a machine without network: tokens of novels, and images of clothes.

    python benchmarks/scale_data.py --text ../shared/data/gutenberg --images ../shared/data/fashion_mnist --file FILE

A byte-level BPE is trained on the text. One number beyond it is left to a mask, so that all models of text have
`--vocab_size` tokens. Tokens are uint16, pixels uint8: less than 64 MiB in all.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from gutenberg import prepare
from quality_generation import load_data

NUM_IMAGES = {"train": 30_000, "test": 5_000}
MAX_BYTES = 64 * 2**20


def packed(text_folder: Path, image_folder: Path, vocab_size: int, train_bytes: int) -> dict:
    """Split -> tokens `[S]`; "images": split -> pixels `[N, 1, 28, 28]` and labels `[N]`; the vocabulary's numbers."""
    with tempfile.TemporaryDirectory() as folder:
        text = torch.load(prepare(text_folder, Path(folder), vocab_size - 1, train_bytes, eval_bytes=3_000_000))
    tokens = {split: text[split].to(torch.uint16) for split in ("train", "validation")}
    images = {
        split: (((pixels[: NUM_IMAGES[split]] + 1) * 127.5).round().byte(), labels[: NUM_IMAGES[split]].byte())
        for split, (pixels, labels) in load_data(image_folder).items()
    }
    return {**tokens, "images": images, "vocab_size": vocab_size, "bytes_per_token": text["bytes_per_token"]}


def unpacked(file: Path) -> dict:
    """The same, as models take it: tokens int64, pixels float32 in [-1, 1]."""
    data = torch.load(file)
    images = {split: (pixels / 127.5 - 1, labels.long()) for split, (pixels, labels) in data["images"].items()}
    return {**data, "train": data["train"].long(), "validation": data["validation"].long(), "images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with train.parquet and validation.parquet")
    parser.add_argument("--images", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--file", type=Path, required=True, help="what is written")
    parser.add_argument("--vocab_size", type=int, default=16384, help="tokens, the mask included")
    parser.add_argument("--train_bytes", type=int, default=64_000_000, help="of text")
    options = parser.parse_args()
    if options.vocab_size > 2**16:
        parser.error(f"--vocab_size={options.vocab_size} must be at most {2**16}: a token has two bytes")
    torch.save(packed(options.text, options.images, options.vocab_size, options.train_bytes), options.file)
    if options.file.stat().st_size > MAX_BYTES:
        parser.error(f"{options.file} has more than {MAX_BYTES >> 20} MiB: take fewer --train_bytes")
    data = torch.load(options.file)
    print(
        f"{options.file}: {options.file.stat().st_size / 2**20:.1f} MiB, {data['bytes_per_token']:.2f} bytes a token, "
        f"{len(data['train']) / 1e6:.1f} M tokens to train on, {len(data['validation']) / 1e6:.2f} M held out"
    )


if __name__ == "__main__":
    main()
