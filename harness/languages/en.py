"""English: the words of a report, and of a model card: headings, sentences, and why a field has no value."""

_REPORT = {
    "lang": "en",
    "emulated": (
        "EMULATED: measured on an emulated {device} (the real torch_npu over an emulated CANN). It shows "
        "that the harness and the model run and how large an Ascend card's rounding is expected to be; it "
        "says nothing about hardware."
    ),
    "faults": (
        "FAULTS WERE PLANTED: {faults}. The device was broken on purpose; nothing here says anything about a sound one."
    ),
    "title": "Accuracy report: {counts}",
    "between": " ",
    "full_stop": ".",
    "counted": "{counts} on {device} ({backend})",
    "none": "no rows",
    "environment": "Environment",
    "component": "component",
    "value": "version or setting",
    "accuracy": "Accuracy",
    "accuracy_intro": (
        "Each row runs the same weights and inputs on the CPU and on {device} ({backend}) in the same dtype. "
        "max_diff and mean_diff are absolute differences in output units, rel_l2 is the norm of the "
        "difference over the norm of the CPU's output, token cos_sim the cosine of the worst token; all are "
        "computed in float64."
    ),
    "limits": "Limits: {limits}.",
    "limits_why": "Limits: {limits}. {reason}",
    "preset": "preset {preset}",
    "to_golden": "rel_l2 to float64",
    "cpu_to_golden": "CPU to float64",
    "golden_ratio": "device / CPU",
    "forecast_ratio": "measured / forecast",
    "case": "case",
    "probe": "operator",
    "rows": "rows",
    "worst_ratio": "worst measured / forecast",
    "fewest_bits": "fewest effective bits",
    "probes_intro": "Probes of single operators; those that passed are counted, precision.json has each.",
    "more_rows": "and {counts}: see the tables and precision.json",
    "left_out": "{count} more, left out for length; precision.json and the HTML report have all",
    "more_reasons": " (and {count} more reasons)",
    "one_more_reason": " (and 1 more reason)",
    "unlocated": (
        "Failing rows of other cases that were not located: {count}. The time for that was over, or they cannot be run "
        "again. --precision-locate-budget=SECONDS gives more time."
    ),
    "all_reasons": "All reasons",
    "located_module": "module",
    "located_operator": "operator",
    "located_line": "line",
    "located_dtype": "dtype",
    "located_shape": "shape",
    "located_own": "own",
    "located_own_ratio": "own / floor",
    "located_inherited": "with what it inherits",
    "located_cause": "cause",
    "repro": "Repro: {command} ({few} of {all} input elements). It printed: {printed}",
    "repro_not_shown": (
        "Repro: {command} ({few} of {all} input elements). It did not show the error in a process of its own. It "
        "printed: {printed}"
    ),
    "how": "How the rows were measured and judged",
    "in_full": "Other numbers of each row",
    "status": "status",
    "filter": "filter",
    "depth_caption": "relative L2 difference to the CPU over {count} operators:",
    "depth_wrong": "wrong",
    "histogram_caption": "elements by |difference|, both axes logarithmic",
    "histogram": "elements by their difference",
    "bits": "effective bits",
    "forecast_bits": "bits forecast",
    "forecast": (
        "Forecast: {forecast}. The error that a healthy device would show; measured / forecast is the "
        "device's error to float64 over the larger of the forecast's and the CPU's."
    ),
    "no_golden": "NO GOLDEN: the model does not run in float64 ({why}).",
    "stored": "{count} of the CPU's runs were read from the reference store.",
    "ran_on": "Ran on {where}.",
    "conditioning": (
        "Conditioning: moving every input by one rounding moves the output by {times} roundings at most ({case})."
    ),
    "rerun": (
        "NONDETERMINISTIC: the device's second run differs from its first by {max_diff} at "
        "most, rel_l2 {rel_l2}, in {unequal} elements."
    ),
    "unfelt": (
        "SWITCH NOT FELT: the switches allow {modes} and the device computed as if they did not; what it "
        "records is not what it does."
    ),
    "seed": "seed",
    "result": "result",
    "top1": "top-1 agreement",
    "topk": "top-5 agreement",
    "kl": "KL (nats)",
    "perplexity_device": "perplexity device",
    "perplexity_cpu": "perplexity CPU",
    "accuracy_device": "accuracy device",
    "accuracy_cpu": "accuracy CPU",
    "weights_seeded": (
        "Weights of {case}: random, seed {seed}; no checkpoint was given. The numbers show that the "
        "arithmetic agrees, not what the trained model does."
    ),
    "weights_file": "Weights of {case}: checkpoint, sha256 {sha}.",
    "weights_loaded": (
        "Weights of {case}: read or made before model() was called{path}; sha256 of their content {content}."
    ),
    "weights_partly": (
        "Weights of {case}: some were drawn at random by model(), the others were read or made before{path}; "
        "sha256 of their content {content}."
    ),
    "weights_built": (
        "Weights of {case}: constants, of which none was read or drawn; sha256 of their content {content}."
    ),
    "weights_path": ", from {path}",
    "reference": "Reference: {reference}.",
    "marks": "NEW: no accepted baseline to hold the row against; --precision-baseline=accept accepts this run.",
    "not_passed": "Rows that did not pass",
    "located": "Where {test} comes from",
    "depth": "error over depth",
    "known": "Known failures",
    "until": "until {day}",
    "known_too": "Rows that fail as known: {count}.",
    "switches": "What the switches cost",
    "switches_intro": (
        "The error that a healthy device is expected to show (rel_l2 to float64) as its switches are, and with a "
        "switch set; a switch that changes nothing here is left out."
    ),
    "switch": "switch",
    "switch_before": "error now",
    "switch_after": "with it",
    "switch_measured": "measured with it",
    "switch_remedy": "how to set it",
    "cards": "Every row on every card",
    "cards_intro": (
        "Each row ran several times on every card. A row differs on a card where a run of it has other bits than most "
        "cards have; the card is named as the odd one where that is not what reruns of the model do on all cards."
    ),
    "cards_card": "card",
    "cards_rows": "rows",
    "cards_rows_differ": "rows that differ",
    "cards_share": "share",
    "cards_runs": "runs",
    "cards_runs_differ": "runs that differ",
    "cards_rows_odd": "rows as the odd one",
    "cards_agree": "{cards} cards agree in every bit of {rows} rows ({runs} runs)",
    "cards_differ": "Of {cards} cards {named}",
    "cards_between": "; ",
    "card_differs": (
        "{card} differs in {rows} of {of} rows ({runs} of {of_runs} runs) and is the odd one in {odd} of them"
    ),
    "quarantined": "Quarantined cards",
    "performance": "Performance",
    "performance_intro": (
        "Forward time in milliseconds, each forward ended by a synchronisation of the device; p99 needs 100 forwards."
    ),
    "performance_queue": (
        "The NPU was timed with TASK_QUEUE_ENABLE={modes} (torch_npu's queue: 0 launches each operator at "
        "once, 1 is its default)."
    ),
    "performance_emulated": "The device is emulated: its times say nothing about hardware.",
    "all_pass": "All {total} rows pass on {device}: largest rel_l2 {rel_l2}, least cos_sim {cos_sim}, both in float64.",
    "some_fail": "{bad} of {total} rows did not pass on {device}.",
    "fault_idle": "The run fails: {faults}. Its rows show nothing about this fault.",
    "nothing": "Nothing was compared.",
    "emulated_again": (
        "Measured on an emulated device: run pytest -k precision --device npu on an Ascend machine for "
        "evidence about a card."
    ),
    "created": "created",
    "history": "History",
    "history_intro": (
        "rel_l2 and cos_distance of each case in each report: the largest over its rows, on a logarithmic axis of each "
        "chart's own. Reports stand in the order in which they were made; a point in the colour of failures is of rows "
        "that fail there, a gap of rows that did not run, a vertical line where versions changed. The cases that fail "
        "come first, then those whose error changed most."
    ),
    "history_some": "{shown} of {total} are shown.",
    "newest": "newest",
}

_CARD = {
    "lang": "en",
    "title": "{name}: adaptation to Ascend NPUs",
    "emulated": (
        "EMULATED: the numbers of this card were measured on an emulated {device} (the real torch_npu over an emulated "
        "CANN). They say nothing about hardware."
    ),
    "cpu": "This card was measured on the CPU alone. It says nothing about an NPU.",
    "introduction": "Introduction",
    "intro": "This repository documents the adaptation of {name} to {device} and its validation against the CPU.",
    "environment": "Environment",
    "notes": "Adaptation notes",
    "weights": "Weights",
    "usage": "How to run",
    "evidence": "Evidence of a run",
    "accuracy": "Accuracy",
    "performance": "Performance",
    "memory": "Memory",
    "files": "Files",
    "regenerate": "How to regenerate this card",
    "limits": "Known limits",
    "citation": "Citation",
    "features": "Features",
    "field": "field",
    "value": "value",
    "component": "component",
    "version": "version or setting",
    "f_task": "task",
    "f_library": "library",
    "f_class": "model class",
    "f_layers": "layers",
    "f_parameters": "parameters",
    "f_dtype": "dtype of the stored weights",
    "f_inputs": "inputs",
    "f_outputs": "outputs",
    "f_licence": "licence",
    "f_languages": "languages",
    "f_base": "base model",
    "no_conversion": "No key was converted: {library} loads the checkpoint as it is.",
    "conversion": (
        "The keys of the checkpoint are in the layout of {layout}. convert_weights.py maps them to the layout of the "
        "model here and joins query, key and value into one matrix; inference.py does so when it loads."
    ),
    "same_layout": "The keys of the checkpoint are those of the model here; nothing is converted.",
    "switches": "Numeric switches in force: {switches}.",
    "no_switches": "This device has no numeric switches.",
    "fell_back": "Computed by the host CPU in place of the device (marked FELL BACK): {rows}.",
    "no_fallback": "No operator fell back to the host CPU.",
    "patched": (
        "The library computes parts of this model otherwise where it sees an NPU, so the CPU's side ran in a process "
        "without torch_npu."
    ),
    "unpatched": "The library does not change this model where it sees an NPU.",
    "weight_file": "file",
    "bytes": "bytes",
    "sha": "sha256 of the checkpoint: {sha}.",
    "get_weights": (
        "Get the weights from where {name} is published and set MODEL_DIR to their directory. They are not part of "
        "this repository."
    ),
    "random_input": "random input",
    "real_image": "a picture",
    "real_text": "a text",
    "real_audio": "a recording",
    "half": "another dtype",
    "install": "dependencies",
    "evidence_intro": "One forward on {device} in {dtype}, with the input of seed {seed}.",
    "output": "output",
    "shape": "shape",
    "dtype": "dtype",
    "first_values": "first values",
    "not_finite": "not finite",
    "top": "Largest values of {name}, first row: {top}.",
    "script_ran": "What inference.py printed when it was run for this card:",
    "accuracy_intro": "CPU and {device} with the same weights and inputs, element by element, computed in float64.",
    "case_dtype": "{case}, {dtype}",
    "case_part": "{title}: {part}",
    "part_decode": "the last token alone, from the cache of those before it",
    "part_batch": "one sample alone and in its batch",
    "part_generate": "a greedy generation",
    "part_retrieval": "the similarity of texts to one another",
    "decided": "Worst decisions: top-1 agreement {top1}, top-{k} agreement {topk}, KL divergence {kl} nats.",
    "perplexity": "Perplexity: {device} {actual}, CPU {expected}.",
    "result": "result",
    "of_outputs": (
        "Of {count} outputs each row shows the one that is furthest off, here {names}; results/precision.json has all."
    ),
    "one_number": "not meaningful: one number",
    "no_decisions": "no decisions among the outputs",
    "nothing_priced": "No numeric switch is priced here: the expected error is at most twice the CPU's own.",
    "nothing_felt": "No numeric switch changes the expected error by more than a hundredth of it.",
    "floor": (
        "Error to float64: {device} {golden}, CPU {cpu}; a healthy device is expected to show {forecast}. "
        "Measured over the largest error of healthy runs (the CPU's is one): {ratio} (up to {allowed} passes)."
    ),
    "percent_intro": 'Every current meaning of "the error is below {limit}", of the worst seed:',
    "meaning": "meaning",
    "formula": "formula",
    "share": "value",
    "meaning_rel_l2": "relative L2",
    "meaning_wape": "mean |Δ| / mean |x|",
    "meaning_mape": "MAPE",
    "meaning_cosine": "1 − cos",
    "meaning_max_rel": "max relative",
    "meaning_score": "task score",
    "below": "below {limit}",
    "yes": "yes",
    "no": "no",
    "asked": "the one that was asked for",
    "laxest": "the laxest",
    "switch_intro": (
        "What the numeric switches cost (rel_l2 to float64 with seed {seed}, expected by the rounding rules; measured "
        "on {device} where there is a column of it):"
    ),
    "all_pass": "Conclusion: all rows pass ({count}).",
    "some_pass": "Conclusion: {passed} of {count} rows pass.",
    "skipped": " Not run: {count}, for the reason given below.",
    "reasons": "Why:",
    "locate": "`python -m harness locate {name}` names the operator that an error comes from.",
    "batch": "batch size",
    "first": "first call (ms)",
    "throughput": "{unit} a second",
    "unit_image": "pictures",
    "unit_text": "sequences",
    "unit_audio": "recordings",
    "unit": "samples",
    "conditions": (
        "Conditions: {device}, {dtype}, {n} forwards after {warmup} to warm up, each ended by a synchronisation."
    ),
    "generation_intro": "Generation of {new} tokens after {prompt}, batch {batch}:",
    "ttft": "time to first token (ms)",
    "tpot": "time per output token (ms)",
    "tokens": "tokens a second",
    "peak": "Peak device memory of one forward, weights included: {size}.",
    "file": "file",
    "what": "what it is",
    "regenerate_intro": "With npu-accuracy-harness installed and the checkpoint in the working directory:",
    "tables_too": (
        "`python -m harness report results/precision.json --lang {lang}` makes the accuracy report again from the "
        "stored rows, without a run."
    ),
    "no_limits": "No limit is known beyond the tables above.",
    "random_weights": (
        "Some or all weights were drawn at random: the numbers show that the arithmetic agrees, not what a trained "
        "model does."
    ),
    "unknown": "not given: {why}",
    "file_README.md": "this document",
    "file_inference.py": "entry for inference",
    "file_convert_weights.py": "conversion of the weights' keys",
    "file_modeling_aimv2_distilled.py": "definition of the model",
    "file_configuration_aimv2_distilled.py": "configuration of the model",
    "file_requirements.txt": "versions of the packages",
    "file_results/precision.json": "the rows: every number of the accuracy and performance tables",
    "file_results/precision.md": "the accuracy report",
    "file_results/card.json": "what this document was made from, besides results/precision.json",
    "file_logs/inference.log": "the output of inference.py",
    # -------- why a field has no value
    "task_unknown": "neither the README of the checkpoint nor its class tells it",
    "licence_unknown": "the checkpoint names none; ask its publisher before you share it",
    "language_unknown": "the README of the checkpoint names none",
    "base_unknown": "the checkpoint names none",
    "citation_unknown": "the README of the checkpoint holds none",
    "times_emulated": "the device is emulated, and its times say nothing about hardware; run with --device npu",
    "times_cpu": "there was no NPU; run with --device npu",
    "times_unknown": "the device is no hardware",
    "memory_emulated": "the device is emulated, and its memory says nothing about hardware; run with --device npu",
    "memory_cpu": "there was no NPU; run with --device npu",
    "memory_unknown": "nothing tells the memory of this device",
    "generates_nothing": "the model generates no text",
    "script_function": "the case is a function of yours, which no script can build",
    "script_pipeline": "a pipeline of several models; each part has its rows above",
    "script_inputs": "its inputs cannot be drawn by a script",
    "script_failed": "it did not run when it was tried; logs/inference.log says why",
}

WORDS = {"report": _REPORT, "card": _CARD}
