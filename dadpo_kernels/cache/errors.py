"""Errors about a cache. All of them are ValueErrors, and their messages say what to do."""


class CacheError(ValueError):
    """A cache cannot be used in the requested way."""


class CacheFormatError(CacheError):
    """The directory is not a cache, or its files do not follow the format."""


class CacheVersionError(CacheError):
    """The cache has another version of the format."""


class CacheIncompleteError(CacheError):
    """The capture that writes the cache is not finished."""


class CacheTruncatedError(CacheError):
    """A shard is missing, or its size differs from the recorded one."""


class CacheChecksumError(CacheError):
    """A file's content differs from what was written."""


class CacheTokenizerError(CacheError):
    """The tokenizer gives some ids of the cache another meaning."""


class CacheVocabularyError(CacheError):
    """The cache holds ids outside the vocabulary."""


class CacheReferenceError(CacheError):
    """Reference log-probabilities are missing, or belong to other pairs."""


class CacheSettingsError(CacheError):
    """The directory holds a capture with other settings."""


class CacheBusyError(CacheError):
    """Another process is writing to the directory."""
