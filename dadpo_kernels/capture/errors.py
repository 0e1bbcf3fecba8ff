"""Errors of an inference engine that scores pairs. They are ValueErrors, and their messages say what to do."""


class ResponseError(ValueError):
    """The response of an inference engine does not hold the requested log-probabilities."""


class ServerError(ValueError):
    """An inference server refused a request, or could not be reached."""
