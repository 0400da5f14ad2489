"""Text from a folder: `<domain>/{train,validation,test}.txt`, documents apart by a blank line."""

from pathlib import Path

from k1.data.documents import Document, Splits, split_documents
from k1.errors import DataError

SPLITS = ("train", "validation", "test")
LAYOUT = "<domain>/{train,validation,test}.txt"


def read_folder(folder: Path) -> dict[str, Splits]:
    """Read every domain of a folder, in alphabetical order.

    Args:
        folder: Holds one folder per domain; files beside them and hidden folders don't matter.

    Raises:
        DataError: Something is missing, empty, not UTF-8 or cannot be read.
    """
    folder = folder.expanduser()
    try:
        domains = _domain_folders(folder)
        return {
            domain.name: {split: _read_split(domain / f"{split}.txt") for split in SPLITS}
            for domain in domains
        }
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(
            f'cannot read "{error.filename or folder}": {reason}; check its permissions'
        ) from error


def _domain_folders(folder: Path) -> list[Path]:
    if not folder.exists():
        raise DataError(
            f'data source "{folder}" is neither "builtin", "hub" nor an existing folder; '
            "check its spelling"
        )
    if not folder.is_dir():
        raise DataError(f'"{folder}" is a file; give the folder that holds {LAYOUT}')
    domains = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not domains:
        raise DataError(f'"{folder}" has no domain folders; put the text into {LAYOUT}')
    return domains


def _read_split(path: Path) -> list[Document]:
    if not path.exists():
        raise DataError(
            f'"{path}" is missing; each folder in a data folder is a domain and needs {LAYOUT}'
        )
    if path.is_dir():
        raise DataError(f'"{path}" is a folder; it has to be a UTF-8 text file')
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f'"{path}" is not UTF-8 (byte {error.start}); convert it, for example with iconv'
        ) from error
    documents = list(split_documents(text))
    if not documents:
        raise DataError(f'"{path}" is empty; put documents into it, apart by a blank line')
    return documents
