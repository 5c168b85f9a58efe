# /// script
# requires-python = ">=3.11"
# dependencies = ["instructor>=1.10,<2", "openai>=1.99,<4"]
# ///
"""instructor in its modes for OpenAI's API."""

import instructor
import openai
from pydantic import BaseModel
from tour import call, run, says


class Person(BaseModel):
    name: str
    age: int


ANSWER = '{"name": "Ada", "age": 36}'


def client(base, mode):
    return instructor.from_openai(openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0), mode=mode)


def user(*answers):
    return [{"role": "user", "content": says(*answers)}]


def typed(url):
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA, instructor.Mode.MD_JSON):
        answer = call("Person", name="Ada", age=36) if mode is instructor.Mode.TOOLS else ANSWER
        made = client(url, mode).chat.completions.create(model="default", messages=user(answer), response_model=Person)
        assert made.model_dump() == {"name": "Ada", "age": 36}, mode


def stream(url):
    api = client(url, instructor.Mode.TOOLS)
    asked = user(call("PartialPerson", name="Ada", age=36))
    parts = list(api.chat.completions.create_partial(model="default", messages=asked, response_model=Person))
    assert parts[-1].model_dump() == {"name": "Ada", "age": 36}


def errors(url):
    try:
        client(url, instructor.Mode.TOOLS).chat.completions.create(
            model="other", messages=user("Hi"), response_model=Person, max_retries=0
        )
    except Exception as error:  # its class differs between versions
        assert "does not exist here" in str(error)
    else:
        raise AssertionError("no error")


run()
