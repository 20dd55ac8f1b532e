"""What [`ldlm_hf.loading.remote_code`] is in the files that it generates: they cannot generate files, only repeat
them."""

from __future__ import annotations


def class_source(cls: type) -> str | None:
    """The text of the file that a class was executed from, which the file's last line recorded in the class.

    None for classes that recorded nothing, such as a tokenizer's.
    """
    return vars(cls).get("_repository_code")
