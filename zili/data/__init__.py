"""Text in, token batches out: sources, tokenizer, token store, loader.

`Loader` and `Prefetcher` live in `zili.data.loader` and `zili.data.prefetch`: they import torch, which must
not happen before a chip's environment is set, and reading or encoding text does without.
"""

from zili.data.building import BuildReport, build_store
from zili.data.prepare import Prepared, prepare
from zili.data.reading import Document, read_documents
from zili.data.sources import Census, fingerprint, standard_library_files
from zili.data.store import TokenStore
from zili.data.tokenizer import DecodeStream, Tokenizer

__all__ = [
    "BuildReport",
    "Census",
    "DecodeStream",
    "Document",
    "Prepared",
    "TokenStore",
    "Tokenizer",
    "build_store",
    "fingerprint",
    "prepare",
    "read_documents",
    "standard_library_files",
]
