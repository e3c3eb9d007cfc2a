"""Look-alike rows of the official benchmarks: invented questions in the columns of the real data sets, for rehearsals."""

from typing import Any

LETTERS = "ABCD"
ROWS = 24  # a split; more than any number of few-shot examples
SUBJECTS = ("anatomy", "astronomy", "college_biology")  # all of MMLU's group STEM, which keeps them in this order
# The splits that the YAML of lm_eval reads.
SPLITS = {
    "mmlu": ("dev", "test"),
    "arc_challenge": ("train", "validation", "test"),
    "arc_easy": ("train", "validation", "test"),
    "piqa": ("train", "validation"),
    "winogrande": ("train", "validation"),
    "gsm8k": ("train", "test"),
    "gsm8k_cot": ("train", "test"),
    "hellaswag": ("train", "validation"),
    "gpqa_main_n_shot": ("train",),
    "race": ("test",),
}


def rows(name: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a benchmark by split; no question stands in two splits."""
    numbers = {split: range(index * ROWS, (index + 1) * ROWS) for index, split in enumerate(SPLITS[name])}
    if name == "mmlu":
        each = ROWS // len(SUBJECTS)
        return {split: [mmlu(number, SUBJECTS[number // each % 3]) for number in part] for split, part in numbers.items()}
    return {split: [row(name, number) for number in part] for split, part in numbers.items()}


def row(name: str, number: int) -> dict[str, Any]:
    """Return one question of a benchmark; the right answer's place goes round with the number."""
    return MAKERS[name](number)


def mmlu(number: int, subject: str = "anatomy") -> dict[str, Any]:
    """Return a question of MMLU."""
    choices = ["up", "down", "left", "right"]
    return {"question": f" Where is part {number}?", "subject": subject, "choices": choices, "answer": number % 4}


def arc(number: int) -> dict[str, Any]:
    """Return a question of ARC."""
    choices = {"text": [f"red {number}", f"green {number}", f"blue {number}"], "label": ["A", "B", "C"]}
    question = f"Which colour is number {number}?"
    return {"id": str(number), "question": question, "choices": choices, "answerKey": LETTERS[number % 3]}


def piqa(number: int) -> dict[str, Any]:
    """Return a question of PIQA."""
    return {"goal": f"Open box {number}", "sol1": "Pull the lid.", "sol2": "Eat the lid.", "label": number % 2}


def winogrande(number: int) -> dict[str, Any]:
    """Return a question of WinoGrande."""
    sentence = f"The cup did not fit into box {number} because _ was too big."
    return {"sentence": sentence, "option1": "the cup", "option2": "the box", "answer": str(1 + number % 2)}


def gsm8k(number: int) -> dict[str, Any]:
    """Return a question of GSM8K."""
    return {"question": f"What is {number} + 1?", "answer": f"It is {number + 1}.\n#### {number + 1}"}


def hellaswag(number: int) -> dict[str, Any]:
    """Return a question of HellaSwag; labels are texts there."""
    first, second = f"Cook {number} cuts an onion.", "the cook [title] then"
    return {
        "activity_label": "Cooking",
        "ind": number,
        "ctx_a": first,
        "ctx_b": second,
        "ctx": f"{first} {second}",
        "endings": ["cries.", "flies.", "[step] sings.", "rings."],
        "source_id": f"invented~{number}",
        "split_type": "indomain",
        "label": str(number % 4),
    }


def gpqa(number: int) -> dict[str, Any]:
    """Return a question of GPQA; lm_eval shuffles the answers."""
    wrong = {f"Incorrect Answer {index}": f"wrong {number}{index}" for index in (1, 2, 3)}
    kind = {"Subdomain": "Invented", "High-level domain": "Physics", "Record ID": f"invented{number}"}
    return {"Question": f"What holds in case {number}?", "Correct Answer": f"right {number}", **wrong, **kind}


def race(number: int) -> dict[str, Any]:
    """Return an article of RACE with an answered question and an open one, written as Python there."""
    options = [f"It is {word}." for word in ("cold", "warm", "wet", "dry")]
    problems = [
        {"question": "How is the day?", "answer": "B", "options": options},
        {"question": f"How is day {number}?", "answer": LETTERS[number % 4], "options": options},
    ]
    return {"example_id": str(number), "article": f"Day {number} came.", "problems": repr(problems)}


MAKERS = {
    "mmlu": mmlu,
    "arc_challenge": arc,
    "arc_easy": arc,
    "piqa": piqa,
    "winogrande": winogrande,
    "gsm8k": gsm8k,
    "gsm8k_cot": gsm8k,
    "hellaswag": hellaswag,
    "gpqa_main_n_shot": gpqa,
    "race": race,
}
