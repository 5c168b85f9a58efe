"""Programs in the style of SGLang's examples and benchmarks, written from its API. Each one runs and checks itself.

`PROGRAMS`: all of them, with the script that answers in place of a model. `WITH_A_MODEL`: those that say something
about any model's answers.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from math import exp
from typing import Any

from ramet.compat import sglang as sgl

Script = Any  # what MockBackend takes
PROGRAMS: dict[str, tuple[Callable[[], None], Script]] = {}
WITH_A_MODEL: list[str] = []


def program(script: Script = None, *, model: bool = False) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def keep(run: Callable[[], None]) -> Callable[[], None]:
        PROGRAMS[run.__name__] = (run, script)
        if model:
            WITH_A_MODEL.append(run.__name__)
        return run

    return keep


# First steps.


@program({"Q: What is the capital of Spain?\nA:": " Madrid"})
def few_shot_completion() -> None:
    @sgl.function
    def answer(s: Any, question: str) -> None:
        s += "Q: What is the capital of Italy?\nA: Rome\n"
        s += "Q: " + question + "\n"
        s += "A:" + sgl.gen("answer", stop="\n", temperature=0)

    state = answer.run(question="What is the capital of Spain?")
    assert state["answer"].strip() == "Madrid"
    assert state.text().endswith("A: Madrid")


@program({"first": "One.", "second": "Two."})
def chat_of_two_turns() -> None:
    @sgl.function
    def chat(s: Any, first: str, second: str) -> None:
        s += sgl.system("You are short.")
        s += sgl.user(first)
        s += sgl.assistant(sgl.gen("answer_1", max_tokens=16))
        s += sgl.user(second)
        s += sgl.assistant(sgl.gen("answer_2", max_tokens=16))

    state = chat.run(first="the first", second="the second", temperature=0)
    assert (state["answer_1"], state["answer_2"]) == ("One.", "Two.")
    assert [m["role"] for m in state.messages()] == ["system", "user", "assistant", "user", "assistant"]


@program({"Rome": "eternal", "Oslo": "cold"})
def batch_of_dictionaries() -> None:
    @sgl.function
    def word(s: Any, city: str) -> None:
        s += f"One word about {city}: " + sgl.gen("word", max_tokens=8)

    states = word.run_batch([{"city": "Rome"}, {"city": "Oslo"}], temperature=0, num_threads=2, progress_bar=False)
    assert [state["word"] for state in states] == ["eternal", "cold"]


@program(["x", "y"])
def batch_of_positions_one_by_one() -> None:
    @sgl.function
    def pair(s: Any, a: str, b: str = "!") -> None:
        s += a + b + sgl.gen("out", max_tokens=4)

    states = pair.run_batch([("a", "b"), ("c",)], num_threads=1, generator_style=True)
    assert [state.text() for state in states] == ["abx", "c!y"]


@program(["Ok."])
def roles_by_begin_and_end() -> None:
    @sgl.function
    def chat(s: Any) -> None:
        s += sgl.system_begin() + "Be kind." + sgl.system_end()
        s += sgl.user_begin()
        s += "Hello"
        s += sgl.user_end()
        s += sgl.assistant_begin() + sgl.gen("reply", 8) + sgl.assistant_end()

    state = chat.run()
    assert [(m["role"], m["content"]) for m in state.messages()] == [
        ("system", "Be kind."),
        ("user", "Hello"),
        ("assistant", "Ok."),
    ]


@program(["Fine."])
def roles_as_blocks() -> None:
    @sgl.function
    def chat(s: Any) -> None:
        with s.user():
            s += "How are "
            s += "you?"
        with s.assistant():
            s += sgl.gen("reply", max_tokens=8)

    assert chat.run().messages()[-1] == {"role": "assistant", "content": "Fine."}


@program(["Yes."])
def roles_as_methods() -> None:
    @sgl.function
    def chat(s: Any) -> None:
        s.system("Say yes or no.")
        s.user("Is it so?")
        s.assistant(sgl.gen("reply", max_tokens=4))

    assert chat.run()["reply"] == "Yes."


@program(["four"])
def the_result_of_the_function() -> None:
    @sgl.function
    def count(s: Any) -> int:
        s += "2+2=" + sgl.gen("n", max_tokens=4)
        return len(s["n"])

    assert count.run().ret_value == 4


@program(["bound"])
def bound_arguments() -> None:
    @sgl.function
    def say(s: Any, a: str, b: str) -> None:
        s += a + b + sgl.gen("out", max_tokens=8)

    assert say.bind(b="B").run(a="A").text() == "ABbound"


@program(["now"])
def a_call_is_a_run() -> None:
    @sgl.function
    def say(s: Any, text: str) -> None:
        s += text + sgl.gen("out", max_tokens=4)

    assert say("Do it ")["out"] == "now"


# Text that is read in Python.


@program(["search", "42"])
def tool_by_choice_then_an_if() -> None:
    @sgl.function
    def tool_use(s: Any, question: str) -> None:
        s += "To answer: " + question + " I need a "
        s += sgl.gen("tool", choices=["calculator", "search engine"]) + ". "
        if s["tool"] == "calculator":
            s += "The expression is " + sgl.gen("expression", max_tokens=4)
        else:
            s += "The key words are " + sgl.gen("words", max_tokens=4)

    state = tool_use.run("What is 6 * 7?", temperature=0)
    assert ("expression" in state) == (state["tool"] == "calculator")
    assert ("words" in state) == (state["tool"] == "search engine")


@program(['{"name": "Ann", "age": 7}'])
def json_of_a_pattern_is_loaded() -> None:
    pattern = r'\{"name": "[A-Z][a-z]{1,8}", "age": [0-9]{1,2}\}'

    @sgl.function
    def character(s: Any, name: str) -> dict[str, Any]:
        s += name + " as JSON: " + sgl.gen("json", max_tokens=64, regex=pattern)
        found: dict[str, Any] = json.loads(s["json"])
        return found

    assert character.run("Ann", temperature=0).ret_value == {"name": "Ann", "age": 7}


@program(['{"city": "Rome", "people": 3}'], model=True)
def json_of_a_schema_is_text() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
        "required": ["city", "people"],
    }

    @sgl.function
    def place(s: Any) -> None:
        s += "A city: " + sgl.gen("json", max_tokens=96, json_schema=json.dumps(schema))

    found = json.loads(place.run(temperature=0)["json"])
    assert isinstance(found["city"], str)
    assert isinstance(found["people"], int)


@program(["Step one. The answer is 12 apples"])
def the_last_number_of_an_answer() -> None:
    @sgl.function
    def solve(s: Any, question: str) -> None:
        s += "Question: " + question + "\nAnswer:" + sgl.gen("answer", max_tokens=64, stop=["Question"])

    numbers = re.findall(r"\d+", solve.run(question="How many?")["answer"])
    assert numbers[-1] == "12"


@program(["17 "], model=True)
def an_integer_is_text_of_digits() -> None:
    @sgl.function
    def guess(s: Any) -> int:
        s += "A number: " + sgl.gen_int("n", max_tokens=8)
        return int(s["n"])

    state = guess.run(temperature=0)
    assert isinstance(state["n"], str)
    assert state.ret_value == int(state["n"])


@program(['"some words" and'], model=True)
def a_string_stands_in_quotes() -> None:
    @sgl.function
    def quote(s: Any) -> None:
        s += "She said: " + sgl.gen_string("words", max_tokens=24)

    words = quote.run(temperature=0)["words"]
    assert words.startswith('"')


@program(["True", "0.5"], model=True)
def kinds_by_name_and_by_type() -> None:
    @sgl.function
    def facts(s: Any) -> None:
        s += "The sky is blue: " + sgl.gen("fact", dtype=bool, max_tokens=4)
        s += "\nHalf is " + sgl.gen("half", dtype="float", max_tokens=6)

    state = facts.run(temperature=0)
    assert state["fact"] in ("True", "False")
    assert re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+", state["half"])


@program(["192.168.0.1 and"], model=True)
def an_address_by_a_pattern() -> None:
    byte = r"(25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"

    @sgl.function
    def address(s: Any) -> None:
        s += "The address is " + sgl.gen("ip", max_tokens=24, temperature=0, regex=rf"({byte}\.){{3}}{byte}")

    parts = address.run()["ip"].split(".")
    assert len(parts) == 4
    assert all(0 <= int(part) <= 255 for part in parts)


@program(["红色的"])
def a_pattern_of_chinese_characters() -> None:
    @sgl.function
    def colour(s: Any) -> None:
        s += "颜色：" + sgl.gen("colour", max_tokens=24, regex=r"[\u4e00-\u9fff]{1,3}")

    assert colour.run(temperature=0)["colour"] == "红色的"


@program(["a b c d e f g h"], model=True)
def at_least_some_tokens() -> None:
    @sgl.function
    def long(s: Any) -> None:
        s += "Go on: " + sgl.gen("text", min_tokens=4, max_tokens=12)

    assert long.run().get_meta_info("text")["completion_tokens"] >= 4


# Choices.


@program({"best": "blue"}, model=True)
def a_selection() -> None:
    @sgl.function
    def colour(s: Any) -> None:
        s += "The best colour is " + sgl.select("colour", choices=["red", "blue"])

    assert colour.run()["colour"] in ("red", "blue")


@program({"best": "blue"}, model=True)
def choices_by_every_method() -> None:
    methods = (
        sgl.token_length_normalized,
        sgl.greedy_token_selection,
        sgl.unconditional_likelihood_normalized,
    )

    @sgl.function
    def colour(s: Any) -> None:
        for index, method in enumerate(methods):
            s += f"{index}. The best colour is "
            s += sgl.gen(f"c{index}", choices=["red", "blue", "green"], choices_method=method) + "\n"

    state = colour.run()
    assert all(state[f"c{index}"] in ("red", "blue", "green") for index in range(3))


@program({"tool": "calculator"}, model=True)
def log_probabilities_of_choices() -> None:
    @sgl.function
    def tool(s: Any) -> None:
        s += "I use a tool: " + sgl.gen("tool", choices=["calculator", "search engine"])

    meta = tool.run().get_meta_info("tool")
    means = [sum(entry[0] for entry in row) / len(row) for row in meta["input_token_logprobs"]]
    assert all(abs(a - b) < 1e-5 for a, b in zip(means, meta["normalized_prompt_logprobs"], strict=True))


@program({"sum": "B"})
def a_multiple_choice_test() -> None:
    @sgl.function
    def question(s: Any, text: str) -> None:
        s += text + "\nAnswer: " + sgl.gen("answer", choices=["A", "B", "C", "D"])

    states = question.run_batch([{"text": "the sum is"}, {"text": "the sum was"}])
    assert Counter(state["answer"] for state in states)["B"] == 2


@program({"He ": "runs away"})
def the_likeliest_ending() -> None:
    @sgl.function
    def ending(s: Any, text: str, endings: list[str]) -> None:
        s += text + sgl.select("ending", choices=endings)

    assert ending.run(text="He ", endings=["runs away", "eats the sun"])["ending"] == "runs away"


# Branches.


@program({"1. ": "Sleep.", "2. ": "Eat.", "summary": "Rest."})
def tips_in_branches() -> None:
    @sgl.function
    def tips(s: Any, topic: str) -> None:
        s += f"Two tips about {topic}.\n"
        forks = s.fork(2)
        for index, f in enumerate(forks):
            f += f"{index + 1}. " + sgl.gen("tip", max_tokens=16, stop="\n")
        s += "Tip 1: " + forks[0]["tip"] + "\nTip 2: " + forks[1]["tip"] + "\n"
        s += "In summary" + sgl.gen("summary", max_tokens=16)

    state = tips.run(topic="health")
    assert "Tip 1: Sleep.\nTip 2: Eat.\n" in state.text()


@program(["a", "b", "c"])
def branches_joined_to_lists() -> None:
    @sgl.function
    def letters(s: Any) -> None:
        s += "Letters: "
        forks = s.fork(3, position_ids_offset=[0, 10, 20])
        forks += sgl.gen("letter", max_tokens=2)
        forks.join()
        s += "all: " + ",".join(s["letter"])

    assert sorted(letters.run()["letter"]) == ["a", "b", "c"]


@program({"Left": "L", "Right": "R"})
def texts_of_branches_appended() -> None:
    @sgl.function
    def halves(s: Any) -> None:
        s += "Start. "
        forks = s.fork(2)
        forks += lambda i: ("Left", "Right")[i] + "=" + sgl.gen("x", max_tokens=2)
        forks.join("concate_and_append")
        s += " End."

    state = halves.run()
    assert state.text() == "Start. Left=LRight=R End."
    assert "x" not in state


@program({"think": "because", "answer": "yes"})
def a_copy_joins_back() -> None:
    @sgl.function
    def hidden(s: Any) -> None:
        s += "Q. "
        with s.copy() as tmp:
            tmp += "think: " + sgl.gen("thought", max_tokens=8)
        s += "answer: " + sgl.gen("answer", max_tokens=8)

    state = hidden.run()
    assert state["thought"] == ["because"]
    assert "because" not in state.text()


@program({"stage 1": "one", "stage 2": "two"})
def forks_of_forks() -> None:
    @sgl.function
    def stages(s: Any) -> None:
        s += "Begin. "
        outer = s.fork(2)
        for f in outer:
            f += "stage 1: " + sgl.gen("a", max_tokens=4)
            inner = f.fork(2)
            inner += " stage 2: " + sgl.gen("b", max_tokens=4)
            inner.join()
        outer.join()

    state = stages.run(temperature=0)
    assert state["a"] == ["one", "one"]
    assert state["b"] == [["two", "two"], ["two", "two"]]


@program(["12", "12", "7"])
def the_most_frequent_answer() -> None:
    @sgl.function
    def vote(s: Any) -> str:
        s += "How many? "
        forks = s.fork(3)
        forks += sgl.gen("n", max_tokens=4, temperature=0.8)
        forks.join()
        return str(Counter(s["n"]).most_common(1)[0][0])

    assert vote.run().ret_value == "12"


@program({"Plan": "A", "Score": "7"})
def a_tree_of_plans() -> None:
    @sgl.function
    def tree(s: Any) -> list[int]:
        s += "Problem. "
        plans = s.fork(2)
        plans += "Plan: " + sgl.gen("plan", max_tokens=4, temperature=0.7)
        scores = []
        for plan in plans:
            (judge,) = plan.fork(1)
            judge += " Score (0-9): " + sgl.gen("score", max_tokens=4, regex="[0-9]")
            scores.append(int(judge["score"]))
        plans.join()
        return scores

    state = tree.run()
    assert state.ret_value == [7, 7]
    assert state["plan"] == ["A", "A"]


@program({"Document 1": "red", "Document 2": "blue", "Question": "both"})
def questions_to_several_documents() -> None:
    @sgl.function
    def answers(s: Any, documents: list[str], question: str) -> None:
        s += "Read.\n"
        forks = s.fork(len(documents))
        forks += lambda i: f"Document {i + 1}: {documents[i]}\nFact: " + sgl.gen("fact", max_tokens=8)
        forks.join("concate_and_append")
        s += "\nQuestion: " + question + "\nAnswer:" + sgl.gen("answer", max_tokens=8)

    assert answers.run(documents=["r", "b"], question="Which?")["answer"] == "both"


@program({"clarity": "good", "style": "bad", "verdict": "fair"})
def a_judge_with_dimensions() -> None:
    @sgl.function
    def judge(s: Any, essay: str) -> None:
        s += sgl.system("You judge.") + sgl.user("Essay: " + essay)
        forks = s.fork(2)
        for f, dimension in zip(forks, ("clarity", "style"), strict=True):
            f += sgl.user("Judge its " + dimension) + sgl.assistant(sgl.gen("judgement", max_tokens=8))
        forks.join()
        s += sgl.user("The verdict? " + " / ".join(s["judgement"]))
        s += sgl.assistant(sgl.gen("verdict", max_tokens=8))

    state = judge.run(essay="...")
    assert state["judgement"] == ["good", "bad"]
    assert state["verdict"] == "fair"


@program(["one", "two", "three"])
def several_samples_of_one_generation() -> None:
    @sgl.function
    def ideas(s: Any) -> None:
        s += "An idea: " + sgl.gen("idea", max_tokens=8, n=3, temperature=0.9)

    state = ideas.run()
    assert sorted(state["idea"]) == ["one", "three", "two"]
    assert state.text() == "An idea: " + state["idea"][0]


# Variables and scopes.


@program(["inner"])
def a_scope_keeps_all_text() -> None:
    @sgl.function
    def scoped(s: Any) -> None:
        s += "before "
        with s.var_scope("part"):
            s += "the " + sgl.gen("word", max_tokens=8) + " part"
        s += " after"

    assert scoped.run()["part"] == "the inner part"


@program(["x"])
def variables_are_set_and_asked_for() -> None:
    @sgl.function
    def variables(s: Any) -> None:
        s.set_var("given", 3)
        s["other"] = "y"
        s += "Say " + sgl.gen("word", max_tokens=2)
        assert "word" in s
        assert s.get_var("given") == 3

    state = variables.run()
    assert (state["given"], state["other"], "nothing" in state) == (3, "y", False)


@program(["short"], model=True)
def details_of_a_generation() -> None:
    @sgl.function
    def one(s: Any) -> None:
        s += "Go: " + sgl.gen("word", max_tokens=16)

    meta = one.run().get_meta_info("word")
    assert meta["finish_reason"]["type"] in ("stop", "length")
    assert meta["prompt_tokens"] > 0


@program(["ab"], model=True)
def log_probabilities_of_generated_tokens() -> None:
    @sgl.function
    def one(s: Any) -> None:
        s += "Go: " + sgl.gen(
            "word", max_tokens=4, return_logprob=True, top_logprobs_num=2, return_text_in_logprobs=True
        )

    state = one.run(temperature=0)
    meta = state.get_meta_info("word")
    assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"])
    assert all(entry[0] <= 0 for entry in meta["output_token_logprobs"])
    assert all(len(top) == 2 for top in meta["output_top_logprobs"])


@program(["w"])
def decoding_from_the_likeliest_first_tokens() -> None:
    @sgl.function
    def paths(s: Any, k: int) -> list[float]:
        s += "Question: how many?\nAnswer:"
        (first,) = s.fork(1)
        forks = s.fork(k)
        first += sgl.gen("first", max_tokens=0, return_logprob=True, top_logprobs_num=k, return_text_in_logprobs=True)
        assert first["first"] == ""
        sure = []
        for f, (_, _, text) in zip(forks, first.get_meta_info("first")["output_top_logprobs"][0], strict=True):
            f += text + sgl.gen("answer", max_tokens=4, temperature=0, return_logprob=True, top_logprobs_num=2)
            tops = f.get_meta_info("answer")["output_top_logprobs"]
            sure.append(sum(exp(top[0][0]) - exp(top[1][0]) for top in tops) / max(1, len(tops)))
        return sure

    assert len(paths.run(3).ret_value) == 3


# Streams.


@program(["one two three four"])
def a_stream_of_all_text() -> None:
    @sgl.function
    def talk(s: Any) -> None:
        s += "Count: " + sgl.gen("numbers", max_tokens=32) + "."

    state = talk.run(stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == "Count: one two three four."
    assert len(pieces) > 3
    assert state["numbers"] == "one two three four"


@program(["one two", "three four"])
def streams_of_two_variables() -> None:
    @sgl.function
    def talk(s: Any) -> str:
        s += sgl.user("a") + sgl.assistant(sgl.gen("first", max_tokens=16))
        s += sgl.user("b") + sgl.assistant(sgl.gen("second", max_tokens=16))
        return "done"

    state = talk.run(stream=True)
    assert "".join(state.text_iter("first")) == "one two"
    assert "".join(state.text_iter(var_name="second")) == "three four"
    assert state.ret_value == "done"


@program(["alpha beta gamma"])
def a_stream_on_an_event_loop() -> None:
    @sgl.function
    def talk(s: Any) -> None:
        s += "Letters: " + sgl.gen("letters", max_tokens=32)

    async def follow() -> str:
        state = talk.run(stream=True)
        return "".join([piece async for piece in state.text_async_iter(var_name="letters")])

    assert asyncio.run(follow()) == "alpha beta gamma"


@program(["whole"])
def an_iterator_without_a_stream() -> None:
    @sgl.function
    def talk(s: Any) -> None:
        s += "Say: " + sgl.gen("word", max_tokens=8)

    state = talk.run()
    assert list(state.text_iter()) == ["Say: whole"]
    assert list(state.text_iter("word")) == ["whole"]


# Agents.


@program({"Observation 0": "Finish[7]", "Thought 1": "look", "Action 1": "Search[x]"})
def thought_and_action_in_turns() -> None:
    @sgl.function
    def react(s: Any, question: str) -> str:
        s += "Question: " + question + "\n"
        for i in range(1, 4):
            s += f"Thought {i}:" + sgl.gen(f"thought{i}", max_tokens=16, stop=[f"Action {i}"]) + "\n"
            s += f"Action {i}:" + sgl.gen(f"action{i}", max_tokens=16, stop=["Observation"]) + "\n"
            action = s[f"action{i}"].strip()
            if i == 2 or action.startswith("Finish"):
                return str(action)
            s += f"Observation {i}: a page about {action}\n"
        return ""

    assert "[" in react.run(question="?", temperature=0).ret_value


@program({"Memory": "She rose early."})
def an_agent_with_memory() -> None:
    @sgl.function
    def plan(s: Any, name: str, memory: list[str]) -> None:
        s += f"{name} is an agent.\n"
        for line in memory:
            s += "Memory: " + line + "\n"
        s += "Next:" + sgl.gen("next", max_tokens=16, stop="\n")

    assert plan.run(name="Eva", memory=["a", "b"])["next"].strip() == "She rose early."


@program({"Guess": "5", "higher": "8"})
def a_guessing_game() -> None:
    @sgl.function
    def game(s: Any, secret: int) -> int:
        s += "Guess: "
        for turn in range(3):
            s += sgl.gen("guess", max_tokens=2, regex="[0-9]")
            if int(s["guess"]) == secret:
                return turn
            s += " higher: "
        return -1

    assert game.run(secret=8, temperature=0).ret_value == 1


@program({"calls": "first second third"})
def generations_that_were_asked_for_at_once() -> None:
    @sgl.function(num_api_spec_tokens=64)
    def names(s: Any) -> None:
        s += "Construct calls: " + sgl.gen("name", max_tokens=8, stop=" ")
        s += " and " + sgl.gen("job", max_tokens=4, stop="\n")

    assert names.run()["name"] == "first"


@program(["<think>\n2+2 is easy\n</think>\n\nIt is 4."])
def thinking_is_separated() -> None:
    @sgl.function
    def think(s: Any) -> None:
        s += sgl.user("2+2?")
        s += sgl.assistant(sgl.separate_reasoning(sgl.gen("answer", max_tokens=64), model_type="qwen3"))

    state = think.run()
    assert state["answer"] == "It is 4."
    assert state["answer_reasoning_content"] == "2+2 is easy"
    assert state.messages()[-1]["content"] == "It is 4."


@program({"Text": "summary"})
def a_prefix_is_cached_before() -> None:
    @sgl.function
    def summary(s: Any, text: str) -> None:
        s += "Summarise the following text in one sentence, and leave out all names and all dates in it. Text: "
        s += text + "\nSummary:" + sgl.gen("summary", max_tokens=8)

    summary.cache()
    summary.pin()
    assert summary.run(text="It rained.").get_meta_info("summary")["cached_tokens"] > 15


@program({"hard": "a joke"})
def defaults_of_a_run() -> None:
    @sgl.function
    def joke(s: Any) -> None:
        s += "Not hard: " + sgl.gen("joke")

    state = joke.run(
        max_new_tokens=3, stop=[], stop_token_ids=[], temperature=0.5, top_p=0.9, top_k=-1, min_p=0.0, ignore_eos=False
    )
    assert state.get_meta_info("joke")["completion_tokens"] <= 3
