"""What can be wrong with a cache or its making, each its own type, all of them ValueErrors that say what to do."""


class CacheError(ValueError):
    """A cache cannot be used as asked."""


class CacheFormatError(CacheError):
    """Not a cache, or files that do not follow the format."""


class CacheVersionError(CacheError):
    """Another version of the format."""


class CacheIncompleteError(CacheError):
    """The capture has not finished."""


class CacheTruncatedError(CacheError):
    """A shard is missing or its size is not the recorded one."""


class CacheChecksumError(CacheError):
    """A file's content is not what was written."""


class CacheTokenizerError(CacheError):
    """Ids of the cache mean other tokens to this tokenizer."""


class CacheVocabularyError(CacheError):
    """Ids of the cache are outside the vocabulary."""


class CacheReferenceError(CacheError):
    """No reference log-probabilities, or those of other pairs."""


class CacheSettingsError(CacheError):
    """A capture with other settings is in the directory."""


class CacheBusyError(CacheError):
    """Another process is writing to the directory."""
