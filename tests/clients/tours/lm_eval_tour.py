# /// script
# requires-python = ">=3.11"
# dependencies = ["lm-eval[api]>=0.4.8,<0.5"]
# ///
"""lm-eval's model for completions with its own scores of answers, and its command line with a file of a task."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tour import run, says


class Bytes:
    """A tokenizer whose tokens are the bytes of a text, as the scripted engine's are."""

    eos_token, eos_token_id, bos_token_id = "\n", 10, None

    def encode(self, text, **options):
        return list(text.encode())

    def decode(self, ids, **options):
        return bytes(ids).decode()

    def __call__(self, texts, **options):
        encoded = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        return SimpleNamespace(input_ids=encoded[0] if isinstance(texts, str) else encoded)


def model(base):
    made = LocalCompletionsAPI(
        base_url=f"{base}/v1/completions",
        model="scripted",
        tokenizer_backend=None,
        tokenized_requests=False,
        max_length=2048,
        batch_size=4,
        num_concurrent=1,
        max_retries=1,
        verify_certificate=False,
    )
    made.tokenizer, made.tokenizer_backend, made.tokenized_requests = Bytes(), "huggingface", True
    return made


def asks(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]


def score(url):
    context = says("Rome") + " The capital of Italy is "
    found = model(url).loglikelihood(asks("loglikelihood", (context, "Rome"), (context, "Oslo")), disable_tqdm=True)
    assert len(found) == 2
    assert all(value < 0 and isinstance(is_greedy, bool) for value, is_greedy in found)


def rolling(url):
    (found,) = model(url).loglikelihood_rolling(asks("loglikelihood_rolling", ("Some words.",)), disable_tqdm=True)
    assert found < 0


def text(url):
    options = {"until": ["\n"], "max_gen_toks": 16}
    assert model(url).generate_until(asks("generate_until", (says("Hello"), options)), disable_tqdm=True) == ["Hello"]


TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def task(url):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers = {"Rome": "Rome", "Oslo": "Oslo", "Bonn": "Berlin"}  # said, and right
        lines = [json.dumps({"question": says(said), "answer": right}) for said, right in answers.items()]
        (folder / "capitals.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (folder / "capitals.yaml").write_text(TASK.replace("FOLDER", name), encoding="utf-8")
        model = f"base_url={url}/v1/completions,model=scripted,tokenizer_backend=None,tokenized_requests=False"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model]
        command += ["--include_path", name, "--tasks", "capitals", "--output_path", f"{name}/out", "--batch_size", "1"]
        here = {**os.environ, "HF_HOME": f"{name}/home", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (found,) = folder.glob("out/**/results_*.json")
        results = json.loads(found.read_text(encoding="utf-8"))["results"]["capitals"]
        assert abs(results["exact_match,none"] - 2 / 3) < 1e-6, results


run()
