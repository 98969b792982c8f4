"""The two tasks the demo model has learned, with a right answer for each prompt.

Every request has exactly one right answer, and different requests mostly have different ones, so
a test that sends many requests can prove that each answer came back under its own request's id.
Standard library only.

    python tools/demo_tasks.py --num 100 --seed 1 > requests.jsonl
    python tools/demo_tasks.py --check results.jsonl --input requests.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Each country is written as it stands inside a sentence. States whose seat of government or
# capital is divided or disputed are left out: every question here must have one right answer.
CAPITALS: dict[str, str] = {
    "Afghanistan": "Kabul",
    "Albania": "Tirana",
    "Algeria": "Algiers",
    "Andorra": "Andorra la Vella",
    "Angola": "Luanda",
    "Antigua and Barbuda": "Saint John's",
    "Argentina": "Buenos Aires",
    "Armenia": "Yerevan",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Azerbaijan": "Baku",
    "the Bahamas": "Nassau",
    "Bahrain": "Manama",
    "Bangladesh": "Dhaka",
    "Barbados": "Bridgetown",
    "Belarus": "Minsk",
    "Belgium": "Brussels",
    "Belize": "Belmopan",
    "Benin": "Porto-Novo",
    "Bhutan": "Thimphu",
    "Bosnia and Herzegovina": "Sarajevo",
    "Botswana": "Gaborone",
    "Brazil": "Brasília",
    "Brunei": "Bandar Seri Begawan",
    "Bulgaria": "Sofia",
    "Burkina Faso": "Ouagadougou",
    "Burundi": "Gitega",
    "Cambodia": "Phnom Penh",
    "Cameroon": "Yaoundé",
    "Canada": "Ottawa",
    "Cape Verde": "Praia",
    "the Central African Republic": "Bangui",
    "Chad": "N'Djamena",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogotá",
    "the Comoros": "Moroni",
    "Costa Rica": "San José",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Cyprus": "Nicosia",
    "the Czech Republic": "Prague",
    "the Democratic Republic of the Congo": "Kinshasa",
    "Denmark": "Copenhagen",
    "Djibouti": "Djibouti",
    "Dominica": "Roseau",
    "the Dominican Republic": "Santo Domingo",
    "East Timor": "Dili",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "El Salvador": "San Salvador",
    "Eritrea": "Asmara",
    "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa",
    "Fiji": "Suva",
    "Finland": "Helsinki",
    "France": "Paris",
    "Gabon": "Libreville",
    "the Gambia": "Banjul",
    "Georgia": "Tbilisi",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Grenada": "Saint George's",
    "Guatemala": "Guatemala City",
    "Guinea": "Conakry",
    "Guinea-Bissau": "Bissau",
    "Guyana": "Georgetown",
    "Haiti": "Port-au-Prince",
    "Honduras": "Tegucigalpa",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "the Ivory Coast": "Yamoussoukro",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Jordan": "Amman",
    "Kazakhstan": "Astana",
    "Kenya": "Nairobi",
    "Kiribati": "South Tarawa",
    "Kosovo": "Pristina",
    "Kuwait": "Kuwait City",
    "Kyrgyzstan": "Bishkek",
    "Laos": "Vientiane",
    "Latvia": "Riga",
    "Lebanon": "Beirut",
    "Lesotho": "Maseru",
    "Liberia": "Monrovia",
    "Libya": "Tripoli",
    "Liechtenstein": "Vaduz",
    "Lithuania": "Vilnius",
    "Luxembourg": "Luxembourg",
    "Madagascar": "Antananarivo",
    "Malawi": "Lilongwe",
    "Malaysia": "Kuala Lumpur",
    "the Maldives": "Malé",
    "Mali": "Bamako",
    "Malta": "Valletta",
    "the Marshall Islands": "Majuro",
    "Mauritania": "Nouakchott",
    "Mauritius": "Port Louis",
    "Mexico": "Mexico City",
    "Micronesia": "Palikir",
    "Moldova": "Chișinău",
    "Monaco": "Monaco",
    "Mongolia": "Ulaanbaatar",
    "Montenegro": "Podgorica",
    "Morocco": "Rabat",
    "Mozambique": "Maputo",
    "Myanmar": "Naypyidaw",
    "Namibia": "Windhoek",
    "Nepal": "Kathmandu",
    "the Netherlands": "Amsterdam",
    "New Zealand": "Wellington",
    "Nicaragua": "Managua",
    "Niger": "Niamey",
    "Nigeria": "Abuja",
    "North Korea": "Pyongyang",
    "North Macedonia": "Skopje",
    "Norway": "Oslo",
    "Oman": "Muscat",
    "Pakistan": "Islamabad",
    "Palau": "Ngerulmud",
    "Panama": "Panama City",
    "Papua New Guinea": "Port Moresby",
    "Paraguay": "Asunción",
    "Peru": "Lima",
    "the Philippines": "Manila",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Qatar": "Doha",
    "the Republic of the Congo": "Brazzaville",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Rwanda": "Kigali",
    "Saint Kitts and Nevis": "Basseterre",
    "Saint Lucia": "Castries",
    "Saint Vincent and the Grenadines": "Kingstown",
    "Samoa": "Apia",
    "San Marino": "San Marino",
    "São Tomé and Príncipe": "São Tomé",
    "Saudi Arabia": "Riyadh",
    "Senegal": "Dakar",
    "Serbia": "Belgrade",
    "Seychelles": "Victoria",
    "Sierra Leone": "Freetown",
    "Singapore": "Singapore",
    "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana",
    "the Solomon Islands": "Honiara",
    "Somalia": "Mogadishu",
    "South Korea": "Seoul",
    "South Sudan": "Juba",
    "Spain": "Madrid",
    "Sudan": "Khartoum",
    "Suriname": "Paramaribo",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Syria": "Damascus",
    "Taiwan": "Taipei",
    "Tajikistan": "Dushanbe",
    "Tanzania": "Dodoma",
    "Thailand": "Bangkok",
    "Togo": "Lomé",
    "Tonga": "Nuku'alofa",
    "Trinidad and Tobago": "Port of Spain",
    "Tunisia": "Tunis",
    "Turkey": "Ankara",
    "Turkmenistan": "Ashgabat",
    "Tuvalu": "Funafuti",
    "Uganda": "Kampala",
    "Ukraine": "Kyiv",
    "the United Arab Emirates": "Abu Dhabi",
    "the United Kingdom": "London",
    "the United States": "Washington",
    "Uruguay": "Montevideo",
    "Uzbekistan": "Tashkent",
    "Vanuatu": "Port Vila",
    "Vatican City": "Vatican City",
    "Venezuela": "Caracas",
    "Vietnam": "Hanoi",
    "Yemen": "Sana'a",
    "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
}
COUNTRIES: tuple[str, ...] = tuple(CAPITALS)

SUM_MIN, SUM_MAX = 10, 99
SUM_WORDINGS = ("What is {a} + {b}?", "Compute {a} + {b}.", "How much is {a} + {b}?")
CAPITAL_WORDINGS = (
    "What is the capital of {country}?",
    "Name the capital of {country}.",
    "Which city is the capital of {country}?",
)

PASS_SHARE = 0.95

_QUESTION = re.compile(
    r"(?<!\d)(?P<a>[1-9]\d) \+ (?P<b>[1-9]\d)(?!\d)|capital of (?P<country>[^?.\n]+)[?.]"
)


def sum_prompt(rng: random.Random, a: int, b: int) -> str:
    return rng.choice(SUM_WORDINGS).format(a=a, b=b)


def capital_prompt(rng: random.Random, country: str) -> str:
    return rng.choice(CAPITAL_WORDINGS).format(country=country)


def random_prompt(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return sum_prompt(rng, rng.randint(SUM_MIN, SUM_MAX), rng.randint(SUM_MIN, SUM_MAX))
    return capital_prompt(rng, rng.choice(COUNTRIES))


def expected_answer(prompt: str) -> str:
    """The right answer to the last question in `prompt`; ValueError if it holds none.

    Text before the question is ignored, so a prompt may be padded to any length.
    """
    questions = list(_QUESTION.finditer(prompt))
    if not questions:
        raise ValueError(f"no demo question in prompt: {prompt[-80:]!r}")
    last = questions[-1]
    country = last["country"]
    if country is None:
        return str(int(last["a"]) + int(last["b"]))
    capital = CAPITALS.get(country) or CAPITALS.get(f"the {country}")
    if capital is None:
        raise ValueError(f"not a country of the demo task: {country!r}")
    return capital


def make_requests(num_requests: int, seed: int, model: str = "demo") -> Iterator[dict[str, Any]]:
    """Yield batch lines req-1 … req-N one at a time; the same seed gives the same lines.

    A shorter run is a prefix of a longer one with the same seed.
    """
    rng = random.Random(seed)
    for number in range(1, num_requests + 1):
        yield {
            "custom_id": f"req-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [{"role": "user", "content": random_prompt(rng)}],
                "max_tokens": 16,
                "temperature": 0,
            },
        }


def request_prompt(line: dict[str, Any]) -> str:
    """The text of the last user message of a batch line."""
    for message in reversed(line["body"]["messages"]):
        if message["role"] == "user":
            return str(message["content"])
    raise ValueError(f"no user message in {line.get('custom_id')!r}")


def result_answer(line: dict[str, Any]) -> str | None:
    """The answer in an output line, or None where the request failed."""
    response = line.get("response")
    if not response or response.get("status_code") != 200:
        return None
    try:
        content = response["body"]["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return None if content is None else str(content).strip()


def _read_jsonl(path: str) -> Iterator[dict[str, Any]]:
    with Path(path).open(encoding="utf-8") as file:
        for text in file:
            if text.strip():
                yield json.loads(text)


def check(inputs: Iterable[dict[str, Any]], results: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Compare output lines with their requests by custom_id.

    A request answered twice counts as not right, even where both answers agree: each request
    must come back exactly once.
    """
    expected = {line["custom_id"]: expected_answer(request_prompt(line)) for line in inputs}
    verdicts: dict[str, str] = {}
    unknown = 0
    for line in results:
        custom_id = str(line.get("custom_id"))
        if custom_id not in expected:
            unknown += 1
        elif custom_id in verdicts:
            verdicts[custom_id] = "repeated"
        else:
            answer = result_answer(line)
            if answer is None:
                verdicts[custom_id] = "failed"
            else:
                verdicts[custom_id] = "right" if answer == expected[custom_id] else "wrong"
    counts = {"total": len(expected), "right": 0, "wrong": 0, "failed": 0, "repeated": 0}
    for verdict in verdicts.values():
        counts[verdict] += 1
    counts["missing"] = len(expected) - len(verdicts)
    counts["unknown"] = unknown
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write requests for the demo model to standard output, or check its answers."
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--num", type=int, metavar="N", help="write N requests")
    mode.add_argument("--check", metavar="RESULTS", help="check this file of output lines")
    parser.add_argument("--seed", type=int, default=1, help="with --num (default: 1)")
    parser.add_argument("--model", default="demo", help="with --num (default: demo)")
    parser.add_argument("--input", metavar="REQUESTS", help="with --check: the file of requests")
    args = parser.parse_args(argv)

    if args.check is None:
        # Line ends and encoding must not depend on the platform or locale: a file made with a
        # given seed is the same bytes everywhere.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        for line in make_requests(args.num, args.seed, args.model):
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
        return 0

    if args.input is None:
        parser.error("--check needs --input")
    counts = check(_read_jsonl(args.input), _read_jsonl(args.check))
    total = counts["total"]
    share = counts["right"] / total if total else 0.0
    print(f"{counts['right']} of {total} right ({share:.2%})")
    print(
        ", ".join(
            f"{counts[name]} {name}"
            for name in ("wrong", "failed", "missing", "repeated", "unknown")
        )
    )
    return 0 if share >= PASS_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
