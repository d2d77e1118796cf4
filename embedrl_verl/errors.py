# SPDX-License-Identifier: Apache-2.0
"""The errors that embedrl-verl raises on purpose.

Every message states the rule, the offending value and the fix. `exit_code` is what a command line program returns.
"""


class EmbedRLError(Exception):
    """Base of all errors raised by this package."""

    exit_code = 4


class ConfigError(EmbedRLError):
    """A configuration key is unknown, missing or has a value that cannot work."""

    exit_code = 2


class DataError(EmbedRLError):
    """A pair record is malformed; the message names file, row and field."""

    exit_code = 3


class MediaError(DataError):
    """An image or a video is missing, unreadable or outside the media root."""


class EmbedderError(EmbedRLError):
    """The Embedder cannot be loaded or cannot embed."""


class ModelFailedError(EmbedderError):
    """A model or its server has failed, and not because of the input that it was given."""


class PluginError(EmbedRLError):
    """The plugin is not registered in verl, or the installed verl is not one it supports."""


class ResourceError(EmbedRLError):
    """Too few CPUs, GPUs or too little memory for the requested run."""
