"""Prepares corpora of text or images: fetches, tokenises or decodes them, and prints their sizes and an example.

python scripts/prepare_data.py --corpora=kjv,austen [--directory=D] [--vocabulary_size=2000]
python scripts/prepare_data.py --objective=classification --corpora=fashion_mnist
python scripts/prepare_data.py --list
"""

from collections.abc import Sequence

from switchjax import command
from switchjax.config import DataConfig
from switchjax.data.describe import describe
from switchjax.data.prepare import prepare_data
from switchjax.data.sources import SOURCES, ImageSource


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--list", action="store_true", help="list the project's own corpora and exit")
    parser.add_argument(
        "--objective", default="span_corruption", help="span_corruption, causal or (for images) classification"
    )
    parser.add_argument(
        "--corpora", default="", help="corpora or TFDS datasets, separated by commas; default: all that --list shows"
    )
    parser.add_argument(
        "--directory", default="", help="where data lives; default: $SWITCHJAX_DATA or the user's cache"
    )
    parser.add_argument(
        "--vocabulary", default="", help="a SentencePiece model file; default: train one on the corpora"
    )
    parser.add_argument("--vocabulary_size", type=int, default=2000, help="number of pieces of a trained vocabulary")
    parser.add_argument("--text_feature", default="text", help="feature of a TFDS dataset that holds its text")
    flags = parser.parse_args(arguments)
    if flags.list:
        for source in SOURCES.values():
            print(f"{source.name:20}{source.description} ({source.license}; {source.package})")
        return
    images = flags.objective == "classification"
    own = [name for name, source in SOURCES.items() if isinstance(source, ImageSource) == images]
    data = prepare_data(
        DataConfig(
            objective=flags.objective,
            corpora=tuple(flags.corpora.split(",")) if flags.corpora else tuple(own),
            directory=flags.directory,
            vocabulary=flags.vocabulary,
            vocabulary_size=flags.vocabulary_size,
            text_feature=flags.text_feature,
            batch_size=1,
        )
    )
    print(describe(data))


if __name__ == "__main__":
    command.run(main)
