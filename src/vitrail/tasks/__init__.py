"""QUESTIONS: a backbone with a loss, figures and an answer per image. `base` is the contract, `classify` the first."""
