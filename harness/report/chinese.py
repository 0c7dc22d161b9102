"""The sentences of reasons, findings, notes and references in Chinese.

Rows keep their sentences in English, as JSON and the terminal show them; a Chinese report says them in Chinese by the
patterns of this file. Names, numbers, statuses, marks, code and what torch or CANN say stay as they are.
"""

from __future__ import annotations

import functools
import re

SAID = 2000  # characters of a text that are looked at: what is longer is what a program said
LONGEST = 400  # characters of what stands for {A}
# English, Chinese. {a} … {f} stand for one word each, {A} … {F} for any text; a pattern may be part of a sentence.
PATTERNS = """
UNDECIDABLE: healthy runs differ so much from float64 that an error of {a} times the output would pass (up to {b} allowed): run the case in a wider dtype, return what comes before the values that tip over, or accept it with | UNDECIDABLE：正常运行与 float64 相差太大，相当于输出 {a} 倍的误差也会通过（最多允许 {b}）：请用更宽的数据类型运行该用例，返回发生翻转之前的数值，或用以下方式接受：
with {a} effective bits where a healthy device keeps {b} | 有效位数为 {a}，而正常设备保有 {b}
(up to {a} allowed) | （最多允许 {a}）
(at least {a} required) | （至少需要 {a}）
; a limit of {a} would pass | ；上限为 {a} 时可以通过
; no limit would pass | ；任何上限都无法通过
at token ( | 位于 token (
at index {a} of axis {b}, off by {c} of its own norm | 位于第 {b} 轴的第 {a} 个切片，误差为该切片自身范数的 {c}
, off by {a} of its own norm | ，误差为该部分自身范数的 {a}
at values between {a} and {b} | 位于 {a} 与 {b} 之间的数值
at block {a} of {b} | 位于 {b} 块中的第 {a} 块
at row {a} | 位于第 {a} 行
{A} where {B} was expected ({C}) | {A}，期望 {B}（{C}）
shape {A} where {B} was expected | 形状为 {A}，期望 {B}
dtype {a} where {b} was expected | 数据类型为 {a}，期望 {b}
{a} where {b} was expected | {a}，期望 {b}
{a} elements are NaN on both sides: nothing can be said of them | 两侧都有 {a} 个元素为 NaN：无法判断
{a} elements are NaN or infinite on one side only, the first at | 有 {a} 个元素仅在一侧为 NaN 或无穷，第一个位于
{a} of {b} elements differ, the first at | {b} 个元素中有 {a} 个不同，第一个位于
(all must be equal) | （必须全部相等）
healthy runs differ in {a} on average: up to {b} allowed | 正常运行平均有 {a} 个不同：最多允许 {b} 个
every output has zero elements: nothing was compared; give inputs that bring some | 所有输出都没有元素：没有比较任何内容；请给出会产生元素的输入
the output is {a} times what was expected, which {A} cannot see; set rel_l2 or gain as well | 输出是期望值的 {a} 倍，{A} 看不到这一点；请同时设置 rel_l2 或 gain
top-1 decisions agree on {a} of {b} inputs | {b} 个输入中有 {a} 个的 top-1 决策一致
; the first that differs is input {a}: | ；第一个不同的输入是 {a}：
{a} elements of the float64 result are not finite where the CPU's {b} is: nothing can be said of them | float64 结果中有 {a} 个元素不是有限值，而 CPU 的 {b} 结果是：无法判断
{a} elements of the CPU's own result are not finite where float64 is: {b} cannot hold this model | CPU 结果中有 {a} 个元素不是有限值，而 float64 结果是：{b} 容不下这个模型
the device computed nothing: no operator but copies and views ran there; keep the model and its inputs on the device | 设备没有进行计算：除复制和视图外没有算子在设备上运行；请把模型和输入留在设备上
FELL BACK: computed by the CPU in place of the device: {A}; there CPU was compared with CPU | FELL BACK：由 CPU 代替设备计算：{A}；这部分是 CPU 与 CPU 的比较
every element of every output is {A} on both sides: nothing shows what computes it; give weights and inputs that do (a last layer of zeros hides all before it) | 两侧所有输出的所有元素都是 {A}：看不出是什么算出来的；请给出能体现差异的权重和输入（最后一层为零会掩盖之前的一切）
every element that the device returned is zero, where the CPU's are up to {a}: it computed nothing here | 设备返回的所有元素都是零，而 CPU 的最大为 {a}：设备在这里没有计算
the same number | 同一个数
Inf or NaN | Inf 或 NaN
; the other of the two runs passes | ；两次运行中的另一次通过
torch.autocast was on for the CPU's side alone, which computed in half precision; write torch.autocast(x.device.type), so that it is on for both or for none | 只有 CPU 一侧启用了 torch.autocast，以半精度计算；请写成 torch.autocast(x.device.type)，使两侧一致
torch.autocast was on for the device's side alone, which computed in half precision; write torch.autocast(x.device.type), so that it is on for both or for none | 只有设备一侧启用了 torch.autocast，以半精度计算；请写成 torch.autocast(x.device.type)，使两侧一致
the device drew random numbers itself, inside of an operator, which the CPU cannot draw: the outputs are of other numbers | 设备在算子内部自行产生了随机数，CPU 无法产生同样的数：输出来自不同的随机数
the model computes otherwise where it sees an NPU: beside torch_npu the CPU differs by rel_l2 {a} from the CPU without it; transformers makes boolean masks of additive ones there, which attn_implementation='eager' avoids; in other code look for | 模型在检测到 NPU 时计算方式不同：有 torch_npu 时的 CPU 结果与没有时相差 rel_l2 {a}；transformers 会把加性掩码变成布尔掩码，attn_implementation='eager' 可以避免；其他代码请查找
REFERENCE UNSTABLE: | REFERENCE UNSTABLE（参考不可重复）：
two runs on the CPU differ by {a} at most, rel_l2 {b}, in {c} elements | 两次 CPU 运行最多相差 {a}，rel_l2 {b}，共 {c} 个元素
: they add in an order that is not fixed, and that is within their roundings | ：加法顺序不固定，差异在舍入范围之内
the first run changed {A}; let the model return the same for the same inputs | 第一次运行改变了 {A}；请让模型对相同输入返回相同结果
; let the model return the same for the same inputs | ；请让模型对相同输入返回相同结果
it changed no parameter, buffer or attribute of the model, which therefore keeps something outside of itself, or draws from a generator that is not torch's, numpy's or Python's own | 模型的参数、缓冲区和属性都没有变化，因此它在自身之外保存了状态，或使用了 torch、numpy、Python 之外的随机数生成器
it would pass if {A}, which no card has confirmed or denied yet: python -m harness doctor --probe FILE measures a vector unit | 如果{A}则可以通过，还没有任何卡证实或否定这一点：python -m harness doctor --probe FILE 可以测量向量单元
exp, tanh, sqrt and their like were always two last places of float32 too large | exp、tanh、sqrt 等总是比 float32 大两个末位
exp, tanh, sqrt and their like were computed in float16 and up to a last place off | exp、tanh、sqrt 等以 float16 计算且最多相差一个末位
half results of elementwise operators were rounded with ties away from zero | 逐元素算子的半精度结果在平局时远离零舍入
healthy runs part at token {a}: compared up to there | 正常运行从第 {a} 个 token 开始分叉：比较到该处为止
no bit of the output changes when every input moves by one rounding: see that the model uses its inputs, and that `forward` returns what this run computed | 每个输入移动一次舍入时输出没有任何一位改变：请检查模型是否使用了输入，以及 `forward` 返回的是否是本次计算的结果
it draws random numbers: every side drew its own | 模型使用随机数：每一侧各自产生
it draws random numbers: all sides got those that the CPU drew | 模型使用随机数：所有侧都使用 CPU 产生的随机数
{a} of {b} whole numbers differ, in healthy runs {c} on average | {b} 个整数中有 {a} 个不同，正常运行平均 {c} 个
near-ties: | 近似平局：
few elements: {a} CPU runs with random roundings show an error made of about {b} independent ones, so a healthy device may lose {c} floors | 元素很少：{a} 次随机舍入的 CPU 运行表明误差约由 {b} 个独立误差组成，因此正常设备可能达到 {c} 倍误差下限
the float64 reference computes in float32 where the model asks for it by name, since it raises otherwise: {A} | 在模型指明 float32 的地方 float64 参考以 float32 计算，否则会报错：{A}
not watched: fallbacks to the CPU were not looked for, since {A} raises while operators are watched, and not otherwise | 未监视：没有检查是否回退到 CPU，因为 {A} 只在监视算子时报错
ON HOST: the model's own code brings values from the device to the CPU and computes there: | ON HOST：模型自己的代码把数值从设备取到 CPU 上计算：
what is not torch's, such as numpy | 非 torch 的库，例如 numpy
model() returned it in training mode and it was run in evaluation mode; Case(training=True) runs it as it is | model() 返回的模型处于训练模式，而运行时使用评估模式；Case(training=True) 按原样运行
matrix products summed in float32 and rounded once | 矩阵乘以 float32 累加、只舍入一次
read from the reference store | 读自参考库
in the process without torch_npu | 在没有 torch_npu 的进程中
convolutions in {a} of {b} bits | 卷积为 {b} 位 {a}
convolutions in {A}, products in {B}, | 卷积为 {A}，矩阵乘为 {B}，
convolutions in {A}, products {B}, | 卷积为 {A}，矩阵乘为 {B}，
convolutions {A}, products {B}, | 卷积为 {A}，矩阵乘为 {B}，
GELU by its tanh formula | GELU 按 tanh 公式
GELU as it is asked for | GELU 按调用时的要求
float16 saturates | float16 饱和
{a} has no {b} | {a} 不支持 {b}
{A}: how this SoC rounds is not known, so there is no expected error; judged by {B} | {A}：这款芯片如何舍入尚不清楚，因此没有预测误差；按{B} 判定
with the budget of HF32, which may be on | （按可能开启的 HF32 的误差预算）
preset {a} | 预设 {a}
Decisions may turn at near-ties, which u = {A} alone can meet. | 决策可能在近似平局处翻转，仅 u = {A} 就足以造成。
compared nothing: the test must hand its case to the `precision` fixture | 没有比较任何内容：测试必须把用例交给 `precision` fixture
not run: the session ended before it | 未运行：会话在此之前结束
it was running when the process died | 进程终止时它正在运行
it was running when the session ended | 会话结束时它正在运行
its process crashed | 其进程崩溃
; the last operator that the device was given: {a} | ；设备最后收到的算子：{a}
; it did not end within its limit: | ；未在时限内结束：
it did not end within its limit | 未在时限内结束
it did not end within {a} s | 未在 {a} 秒内结束
the device stopped computing at {A}: | 设备在 {A} 处停止计算：
; nothing more is run on the device in this process | ；本进程不再在该设备上运行任何内容
on {a} ({A}): | 在 {a}（{A}）上：
; raised in {A} | ；出错位置：{A}
; noticed in {A}, which may come after the operator that failed | ；在 {A} 处发现，出错的算子可能在此之前
no baseline for {A}; accept this run with --precision-baseline=accept | {A} 没有基线；用 --precision-baseline=accept 接受本次结果
{A} ran with other {B} ({C}) than were accepted ({D}); its numbers cannot be compared: run with the accepted ones, or --precision-baseline=accept | {A} 使用的 {B}（{C}）与已接受的（{D}）不同，数值无法比较：请使用已接受的那些，或用 --precision-baseline=accept
: error to float64 {a} where {b} was accepted ({c} times) | ：对 float64 的误差为 {a}，已接受的是 {b}（{c} 倍）
, to every digit, though the bits are others | ，每一位数字都相同，但二进制位不同
, {a} times on average over {b} seeds | ，{b} 个种子平均 {a} 倍
: every bit of the device's output as accepted | ：设备输出的每一位都与已接受的相同
: every bit as accepted | ：每一位都与已接受的相同
{A} is off by {a} where {b} was accepted | {A} 的误差为 {a}，已接受的是 {b}
the worst token of the output | 输出中最差的 token
the worst token of {a} | {a} 中最差的 token
find out what changed, or accept it with --precision-baseline=accept | 请查明变化原因，或用 --precision-baseline=accept 接受
two rows are called {A}, of {B}, which measures it twice; one would hide the other: give the cases names of their own, or each row a seed of its own | 有两行都叫 {A}，来自 {B}，测量了两次；一行会掩盖另一行：请给用例各自的名字，或给每一行各自的种子
is the first wrong operator: | 是第一个出错的算子：
is the first wrong module: | 是第一个出错的模块：
is the first wrong call: | 是第一个出错的调用：
is what raises when the model runs on the device by itself: | 是模型单独在设备上运行时报错的地方：
: the model takes another path on the device, and a wrong one: | ：模型在设备上走了另一条路径，而且是错误的：
So do {a} more modules. | 另有 {a} 个模块也是如此。
is where the device's values become others than the CPU's: | 是设备的数值开始与 CPU 不同的地方：
is where the device's gradients become others than the CPU's: | 是设备的梯度开始与 CPU 不同的地方：
{a} more are wrong by themselves. | 另有 {a} 个算子自身出错。
No other operator is wrong by itself: what comes after inherits. | 没有其他算子自身出错：之后的误差是继承的。
{a} more were not looked at: the device does not compute any more. | 另有 {a} 个没有检查：设备已不再计算。
{a} more were not looked at: the time was over. | 另有 {a} 个没有检查：时间已用完。
Nothing was looked at: the model calls no {a} of its own. | 没有可检查的内容：模型没有调用自己的 {a}。
Nothing was looked at. | 没有检查任何内容。
None of the {a} operators that the CPU runs is wrong with the CPU's inputs. | CPU 运行的 {a} 个算子在使用 CPU 的输入时都没有出错。
No operator was looked at by itself. | 没有单独检查任何算子。
The operators that the CPU runs give a difference of {a} of the row's {b} on the device | CPU 运行的算子在设备上给出 {a} 的差异，而这一行的差异为 {b}
The operators that the CPU runs give a difference of {a} of a plain run's {b} on the device | CPU 运行的算子在设备上给出 {a} 的差异，而普通运行的差异为 {b}
: there is more that is wrong | ：还有其他错误
Besides, | 此外，
Together they give a difference of {a} of the row's {b}: its error is elsewhere. | 它们合起来给出 {a} 的差异，而这一行的差异为 {b}：误差在别处。
Together they give a difference of {a} of a plain run's {b}: its error is elsewhere. | 它们合起来给出 {a} 的差异，而普通运行的差异为 {b}：误差在别处。
The first call that shows it is {A}. | 第一个表现出误差的调用是 {A}。
What they give together was not measured: from {A} on the device had the CPU's numbers. | 没有测量它们合起来的结果：从 {A} 起设备使用的是 CPU 的数值。
The row's error did not come back: nothing raised, neither operator by operator nor in a run of its own; the row's reason says where it was raised. | 这一行的错误没有重现：无论逐个算子运行还是单独运行都没有报错；报错位置见这一行的原因。
No operator is wrong: each of {a} is within its floor with the CPU's inputs. | 没有算子出错：使用 CPU 的输入时，{a} 个算子都在误差下限之内。
No module is wrong: each of {a} is within its floor with the CPU's inputs. | 没有模块出错：使用 CPU 的输入时，{a} 个模块都在误差下限之内。
But the model is another where torch_npu is: what it gives on the CPU of this process is {a} away from what it gives in one without, which the row is held against (transformers turns masks that are not boolean around). | 但有 torch_npu 时模型不同：本进程 CPU 上的结果与没有 torch_npu 的进程相差 {a}，而这一行是与后者比较的（transformers 会反转非布尔掩码）。
{a} modules take another path on the device and are within their floors. | 有 {a} 个模块在设备上走另一条路径，误差在下限之内。
{a} fell back to the CPU, the first is {A}. | 有 {a} 个回退到 CPU，第一个是 {A}。
The largest own difference is {a} | 最大的自身差异是 {a}
The fault did not come back: the row differs from the CPU by {a}, the same run while locating by {b}. | 错误没有重现：这一行与 CPU 相差 {a}，定位时同样的运行相差 {b}。
Its own two runs differ too. | 它自己的两次运行也不相同。
The row's own two runs differ: its fault comes and goes, and did not show in one operator here. | 这一行自己的两次运行不同：错误时有时无，没有在单个算子中出现。
Look at what is inside of the transform: let the case's forward make these calls one by one. | 请检查变换内部：让用例的 forward 逐个进行这些调用。
Look at what the model does outside of torch's functions: code of its own that leaves the device, extensions in C++, paths that torch takes only without such a look (MultiheadAttention's fast path). | 请检查模型在 torch 函数之外做了什么：自己离开设备的代码、C++ 扩展、torch 只在不受监视时才走的路径（MultiheadAttention 的快速路径）。
It could not be located: | 无法定位：
all of it is multiplied by {a} | 整体被乘以 {a}
All of it is multiplied by {a}. | 整体被乘以 {a}。
{a} is added to all of it | 整体加上了 {a}
it computes as if its operands and its result were rounded to {a} | 计算结果相当于操作数和结果都舍入到 {a}
it computes as if its operands were rounded to {a} | 计算结果相当于操作数舍入到 {a}
its result is rounded to {a} | 结果被舍入到 {a}
it computes as without its bias | 计算时没有加偏置
it computes as with the mask | 计算时掩码
it computes as with {a} | 计算时相当于 {a}
it computes GELU by its tanh formula | 按 tanh 公式计算 GELU
it differs from run to run, by {a} | 每次运行结果不同，相差 {a}
differs from run to run | 每次运行结果不同
its output is not written, or not all of it: it shows what the memory held before | 输出没有写入或没有全部写入：显示的是内存中原有的内容
{a} of {b} elements are {c}, the first at | {b} 个元素中有 {a} 个为 {c}，第一个位于
{a} of {b} elements are zero, from {A} to {B} | {b} 个元素中有 {a} 个为零，从 {A} 到 {B}
, from finite inputs | ，而输入是有限值
an input is a view that is not contiguous; made contiguous, it passes | 有一个输入是不连续的视图；变为连续后可以通过
{a} elements are written more than once, since indices repeat: torch leaves open which write stays, and the device | 由于索引重复，有 {a} 个元素被多次写入：torch 没有规定保留哪一次，而设备
keeps another of the writes than the CPU | 保留的写入与 CPU 不同
keeps the first write | 保留第一次写入
adds the writes up | 把各次写入相加
GELU takes its tanh formula here whatever is asked for | GELU 在这里总是按 tanh 公式计算
, unless torch.npu.use_compatible_impl(True) comes before the first GELU | ，除非在第一个 GELU 之前调用 torch.npu.use_compatible_impl(True)
{a} is on: with {b} = False it is {c} | {a} 已开启：设置 {b} = False 后为 {c}
the device raised | 设备报错：
the device gives it {A} where the CPU gives it {B}: a difference of {a} | 设备给它 {A}，CPU 给它 {B}：相差 {a}
; with the CPU's inputs {a} | ；使用 CPU 的输入时 {a}
it differs from the CPU by {a} where a healthy device would by {b} | 与 CPU 相差 {a}，正常设备应为 {b}
torch.autocast computes it in {a} on the device, in {b} on the CPU: not judged | torch.autocast 在设备上以 {a} 计算、在 CPU 上以 {b} 计算：不判定
on the CPU alone | 仅在 CPU 上
the CPU computes it in place of the device: | 由 CPU 代替设备计算：
(acted on {a} of the {b} calls that it matches) | （在匹配的 {b} 次调用中作用了 {a} 次）
the model | 整个模型
which did not show it in a process of its own | 在单独的进程中没有重现
 of {a} input elements) | /{a} 个输入元素）
Repro: | 复现脚本：
EMULATED: measured on an emulated device; it says nothing about hardware | EMULATED（模拟）：在模拟设备上测得，与硬件无关
FAULT PLANTED: | 植入的故障：
{a} never acted: none of the operators that it names ran, or there was nothing to change | {a} 从未起作用：它指定的算子没有运行，或没有可改变的内容
located {A}: {B} | 定位 {A}：{B}
{a} failing rows were not located: the budget of {b} s is spent; --precision-locate-budget | {a} 个失败的行没有定位：{b} 秒的预算已用完；见 --precision-locate-budget
{a} rows are of the run before, which this one resumes | {a} 行来自上一次运行，本次在其基础上继续
accepted {a} rows into {A}; their report is {B} | 已将 {a} 行接受到 {A}；其报告为 {B}
{a} limits could come down: | {a} 个上限可以收紧：
{a} accepted rows of {A} did not run: | {A} 有 {a} 个已接受的行没有运行：
{A} is judged more loosely than when it was accepted: {B}; put the limit back, or --precision-baseline=accept | {A} 的判定比接受时宽松：{B}；请恢复上限，或用 --precision-baseline=accept
{A} is not accepted: {a} of its rows did not pass; a baseline of a failure would hide it: mend it, or enter it in the known failures | {A} 没有被接受：有 {a} 行未通过；失败的基线会掩盖它：请修复，或登记为已知失败
{a} known failures are no rows of this run: | {a} 个已知失败不是本次运行的行：
{a} row did not pass, and pytest counts no failure: | {a} 行未通过，而 pytest 没有计为失败：
{a} rows did not pass, and pytest counts no failure: | {a} 行未通过，而 pytest 没有计为失败：
a failure that is to be accepted belongs into cases/known_failures.toml, with a link and a day (pytest's xfail has neither) | 要接受的失败应写入 cases/known_failures.toml，附链接和日期（pytest 的 xfail 两者都没有）
nothing was measured: no test handed a case to the `precision` fixture | 没有测量任何内容：没有测试把用例交给 `precision` fixture
nothing was measured: | 没有测量任何内容：
precision() was called in a process that the test forked, whose rows reach no report; call it in the test | 在测试 fork 出的进程中调用了 precision()，其结果不会进入报告；请在测试中调用
the test went on although a row of it did not pass | 测试的某一行未通过，测试却继续运行
its test had ended before it began: a test must wait for the threads that it starts | 开始之前其测试已经结束：测试必须等待它启动的线程
no float32 row beside {a}: {A}; a logic error that moves the output by less than two floors of {b} cannot be seen in this case | {a} 旁边没有 float32 行：{A}；使输出偏移小于 {b} 两倍误差下限的逻辑错误在该用例中看不到
it has the same inputs as {A}, so it measures nothing new: inputs() does not draw from its generator; let it, or run the case with one seed | 输入与 {A} 相同，没有测量新的内容：inputs() 没有使用它的随机数生成器；请使用，或只用一个种子运行该用例
all must be equal | 必须全部相等
HF32 of {a} bits | {a} 位 HF32
"""  # noqa: E501  a table: one pattern a line


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    """The patterns, the longest first, since one may be part of another."""
    pairs = [line.split(" | ", 1) for line in PATTERNS.splitlines() if " | " in line]
    pairs.sort(key=lambda pair: -len(pair[0]))
    return tuple((_compiled(english), chinese.strip()) for english, chinese in pairs)


def _compiled(english: str) -> re.Pattern[str]:
    parts = re.split(r"\{([a-zA-Z])\}", english)
    pattern = re.escape(parts[0])
    for place in range(1, len(parts), 2):
        name, after = parts[place], parts[place + 1]
        kind = r"[^\s;]" if name.islower() else "."
        pattern += f"(?P<{name}>{kind}{{1,{LONGEST}}}{'?' if after else ''})"
        pattern += re.escape(after) + (r"(?!\d)" if after == "." else "")  # "1.001" is no end of a sentence
    before = r"(?<![\w.])" if english[0].isalnum() else ""
    before = r"(?:^|(?<=[;:.→(] ))" if english[0] == "{" else before
    after = r"(?!\w)" if english[-1].isalnum() or english[-1] == "}" else ""
    return re.compile(before + pattern + after)


@functools.lru_cache(maxsize=10_000)
def chinese(text: str) -> str:
    """A sentence of a report in Chinese, as far as its parts are known here.

    >>> chinese("max_diff 5.00e+00 at (0, 3) (up to 1.00e-02 allowed); a limit of 5.01e+00 would pass")
    'max_diff 5.00e+00 at (0, 3)（最多允许 1.00e-02）；上限为 5.01e+00 时可以通过'
    """
    text, rest = text[:SAID], text[SAID:]
    for pattern, said in _patterns():
        if pattern.search(text):
            text = pattern.sub(functools.partial(_filled, said), text)
    text = re.sub(r"(?<=[\u4e00-\u9fff）])([.;,:])(?: |$)", lambda found: MARKS[found[1]], text)
    return re.sub(r" (?=（)|(?<=[：；。，]) ", "", text) + rest


MARKS = {".": "。", ";": "；", ",": "，", ":": "："}


def _filled(said: str, found: re.Match[str]) -> str:
    return re.sub(r"\{([a-zA-Z])\}", lambda name: found[name[1]], said)
