"""The words of the report, in English and Chinese; what rows say, which is English, is in Chinese by `chinese`."""

from __future__ import annotations

from collections.abc import Mapping

from harness.report.chinese import chinese

EN = {
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
    "all_reasons": "All reasons",
    "located_own_ratio": "own / floor",
    "located_inherited": "with what it inherits",
    "repro": "Repro: {command} ({few} of {all} input elements). It printed: {printed}",
    "repro_not_shown": (
        "Repro: {command} ({few} of {all} input elements). It did not show the error in a process of its own. It "
        "printed: {printed}"
    ),
    "how": "How the rows were measured and judged",
    "in_full": "Other numbers of each row",
    "status": "status",
    "filter": "filter",
    "reason": "reason",
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
    "known_too": "{count} rows fail as known.",
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

ZH = {
    "lang": "zh",
    "emulated": (
        "EMULATED（模拟）：在模拟的 {device} 上测得（真实的 torch_npu，模拟的 CANN）。它说明测试框架与模型可以运"
        "行，以及昇腾卡的舍入误差预计有多大；不构成任何硬件上的证据。"
    ),
    "faults": "注入了故障：{faults}。设备上人为注入故障；这里的结果不能说明正常设备的任何情况。",
    "title": "精度报告：{counts}",
    "between": "",
    "full_stop": "。",
    "counted": "{device}（{backend}）：{counts}",
    "none": "没有结果",
    "environment": "环境",
    "component": "组件",
    "value": "版本或设置",
    "accuracy": "精度评测",
    "accuracy_intro": (
        "每一行用相同的权重和输入、相同的数据类型，在 CPU 与 {device}（{backend}）上各运行一次。"
        "max_diff 与 mean_diff 是以输出单位计的绝对误差，rel_l2 "
        "是误差的范数与 CPU 输出范数之比，token cos_sim 是最差 token 的余弦；全部以 float64 计算。"
    ),
    "limits": "判定标准：{limits}。",
    "limits_why": "判定标准：{limits}。{reason}",
    "preset": "预设 {preset}",
    "to_golden": "对 float64 的 rel_l2",
    "cpu_to_golden": "CPU 对 float64",
    "golden_ratio": "设备 / CPU",
    "forecast_ratio": "实测 / 预测",
    "case": "用例",
    "probe": "算子",
    "rows": "行数",
    "worst_ratio": "最大 实测 / 预测",
    "fewest_bits": "最少有效位数",
    "probes_intro": "单算子测试；通过的只计数，每一行见 precision.json。",
    "more_rows": "另有 {counts}：见下表与 precision.json",
    "left_out": "另有 {count} 项因篇幅省略；precision.json 与 HTML 报告中有全部内容",
    "all_reasons": "全部原因",
    "located_module": "模块",
    "located_operator": "算子",
    "located_line": "代码行",
    "located_dtype": "dtype",
    "located_shape": "形状",
    "located_own": "自身误差",
    "located_own_ratio": "自身误差 / 误差基底",
    "located_inherited": "含继承的误差",
    "located_cause": "原因",
    "repro": "复现脚本：{command}（{all} 个输入元素中的 {few} 个）。脚本的输出：{printed}",
    "repro_not_shown": (
        "复现脚本：{command}（{all} 个输入元素中的 {few} 个）。在单独的进程中没有重现该误差。脚本的输出：{printed}"
    ),
    "how": "测量与判定方法",
    "in_full": "每一行的其他数值",
    "status": "状态",
    "filter": "筛选",
    "reason": "原因",
    "histogram": "按误差大小统计的元素数",
    "bits": "有效位数",
    "forecast_bits": "预测位数",
    "forecast": (
        "预测：{forecast}。即正常设备应有的误差；“实测 / 预测”是设备对 float64 的误差与预测误差、CPU 误差中较大者之比。"
    ),
    "no_golden": "NO GOLDEN：模型无法以 float64 运行（{why}）。",
    "stored": "{count} 次 CPU 运行的结果读自参考库。",
    "ran_on": "在 {where} 上运行。",
    "conditioning": "条件数：输入各变化 1 个舍入单位时，输出最多变化 {times} 个舍入单位（{case}）。",
    "rerun": ("NONDETERMINISTIC：设备的第二次运行与第一次最多相差 {max_diff}，rel_l2 {rel_l2}，共 {unequal} 个元素。"),
    "unfelt": "SWITCH NOT FELT：开关允许 {modes}，设备却像没有开启一样计算；记录的开关与实际不符。",
    "seed": "seed",
    "result": "结果",
    "top1": "top-1 一致率",
    "topk": "top-5 一致率",
    "kl": "KL（奈特）",
    "perplexity_device": "设备困惑度",
    "perplexity_cpu": "CPU 困惑度",
    "accuracy_device": "设备准确率",
    "accuracy_cpu": "CPU 准确率",
    "weights_seeded": "{case} 的权重：随机，种子 {seed}；未提供检查点。数字说明计算是否一致，不代表训练后的模型。",
    "weights_file": "{case} 的权重：检查点，sha256 {sha}。",
    "weights_loaded": "{case} 的权重：由 model() 读取或事先已存在{path}，内容 sha256 {content}。",
    "weights_partly": "{case} 的权重：一部分由 model() 随机生成，其余为读取或事先已存在{path}，内容 sha256 {content}。",
    "weights_built": "{case} 的权重：均为常数，既非读取也非随机生成，内容 sha256 {content}。",
    "weights_path": "，来自 {path}",
    "reference": "参考：{reference}。",
    "marks": "NEW：还没有可供比较的已接受基线；用 --precision-baseline=accept 接受本次结果。",
    "not_passed": "未通过的行",
    "located": "{test} 的误差来源",
    "depth": "误差随深度的变化",
    "known": "已知失败",
    "until": "有效期至 {day}",
    "known_too": "另有 {count} 行为已知失败。",
    "switches": "各开关的精度代价",
    "switches_intro": (
        "正常设备应有的误差（对 float64 的 rel_l2）：当前开关下，以及设置某个开关之后；没有影响的开关不列出。"
    ),
    "switch": "开关",
    "switch_before": "当前误差",
    "switch_after": "设置后",
    "switch_measured": "设置后实测",
    "switch_remedy": "设置方法",
    "cards": "每一行在每张卡上",
    "cards_intro": (
        "每一行在每张卡上运行多次。某张卡上有一次运行的比特与多数卡不同，该行在这张卡上就算不一致；"
        "如果这种差异不是模型在所有卡上重复运行时都会出现的，则判定该卡异常。"
    ),
    "cards_card": "卡",
    "cards_rows": "行数",
    "cards_rows_differ": "不一致的行",
    "cards_share": "比例",
    "cards_runs": "运行次数",
    "cards_runs_differ": "不一致的运行",
    "cards_rows_odd": "判定异常的行",
    "cards_agree": "{cards} 张卡在 {rows} 行（{runs} 次运行）中每个比特都一致",
    "cards_differ": "{cards} 张卡中：{named}",
    "cards_between": "；",
    "card_differs": (
        "{card} 在 {of} 行中有 {rows} 行不一致（{of_runs} 次运行中有 {runs} 次），其中 {odd} 行判定该卡异常"
    ),
    "quarantined": "被隔离的卡",
    "performance": "性能基准",
    "performance_intro": "前向时间（毫秒），每次前向后同步设备；p99 至少需要 100 次前向。",
    "performance_queue": "NPU 计时时 TASK_QUEUE_ENABLE={modes}（torch_npu 任务队列：0 为逐算子下发，1 为其默认值）。",
    "performance_emulated": "设备是模拟的：这些时间与硬件无关。",
    "all_pass": (
        "{device} 上 {total} 行全部通过：最大 rel_l2 为 {rel_l2}，最小 cos_sim 为 {cos_sim}，均以 float64 计算。"
    ),
    "some_fail": "{device} 上 {total} 行中有 {bad} 行未通过。",
    "fault_idle": "本次运行失败：{faults}。各行结果不能说明该故障的任何情况。",
    "nothing": "没有进行任何比较。",
    "emulated_again": "以上在模拟设备上测得：请在昇腾机器上运行 pytest -k precision --device npu 以得到硬件上的证据。",
    "created": "生成时间",
    "history": "历史",
    "history_intro": (
        "每个用例在各份报告中的 rel_l2 与 cos_distance：取各行中的最大值，每张图各用自己的对数坐标。"
        "报告按生成时间排列；失败颜色的点表示该次有行未通过，断开处表示该次没有运行，竖线处版本有变化。"
        "未通过的用例在前，其后按误差变化由大到小排列。"
    ),
    "history_some": "共 {total} 个用例，显示其中 {shown} 个。",
    "newest": "最新",
}

LANGUAGES = {"en": EN, "zh": ZH}


def told(text: str, words: Mapping[str, str]) -> str:
    """A sentence of a row, which is English, in the report's language."""
    return chinese(text) if words["lang"] == "zh" else text
