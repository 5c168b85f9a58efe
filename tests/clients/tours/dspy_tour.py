# /// script
# requires-python = ">=3.11"
# dependencies = ["dspy>=3,<4"]
# ///
"""DSPy's language model and its adapters."""

import dspy
from tour import run, says

FIELDS = "[[ ## answer ## ]]\n{}\n\n[[ ## completed ## ]]"


class Question(dspy.Signature):
    question: str = dspy.InputField()
    answer: int = dspy.OutputField()


def model(base, **options):
    known = {"model": "openai/default", "api_base": f"{base}/v1", "api_key": "none", "cache": False, "num_retries": 0}
    return dspy.LM(**{**known, **options})


def text(url):
    with dspy.context(lm=model(url)):
        assert dspy.Predict("question -> answer")(question=says(FIELDS.format("Hello"))).answer == "Hello"


def typed(url):
    with dspy.context(lm=model(url), adapter=dspy.ChatAdapter()):
        assert dspy.Predict(Question)(question=says(FIELDS.format("41"))).answer == 41
    with dspy.context(lm=model(url), adapter=dspy.JSONAdapter()):
        assert dspy.Predict(Question)(question=says('{"answer": 41}')).answer == 41


def responses(url):
    with dspy.context(lm=model(url, model_type="responses")):
        assert dspy.Predict("question -> answer")(question=says(FIELDS.format("Hello"))).answer == "Hello"


def errors(url):
    try:
        model(url, model="openai/other")(says("Hi"))
    except Exception as error:  # litellm's or its own
        assert "does not exist here" in str(error)
    else:
        raise AssertionError("no error")


run()
