"""What can be wrong with an inference engine that scores pairs; both are ValueErrors that say what to do."""


class AnswerError(ValueError):
    """An inference engine's answer is not the log-probabilities it was asked for."""


class ServerError(ValueError):
    """An inference server refused a request, or could not be reached."""
