"""After the chain: evaluation, for now nothing."""


def evaluate_run(run):
    return None
