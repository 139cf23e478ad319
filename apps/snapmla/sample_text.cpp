// What `snapmla inspect --cache` reads when it is given no text: prose, code with facts to find
// again, a table to recall from and a ledger, the last three as the shipped model knows them
// (models/train/tasks.py, "dev" stream).
#include "inspect_cache.h"

namespace snapmla::app {

// clang-format off
extern const char* const kSampleText =
    R"text(A cache keeps what has been computed once and will be needed again. In a language model that writes one token
after another, every new token looks back at all the earlier ones, and what it looks at does not change: so each
layer stores a row per token and reads all rows again for the next. Soon the rows weigh more than the model. A
document of a hundred thousand tokens, read by a model with sixty layers, fills gigabytes, and each new token has
to move all of them through the processor once. That is why long answers are slow, and why people have tried to
make the rows smaller.

Latent attention makes them smaller by storing a summary instead of keys and values for every head. The summary
has 512 numbers; two matrices per head turn it back into a key and a value when they are wanted, and since a
matrix may be multiplied into the question just as well as into the answer, they need not be applied to the rows
at all. Position is the one thing that does not fit into this scheme, because a rotation that depends on the
distance cannot be folded into a fixed matrix. So 64 further numbers per token carry the position. They are few,
they are rotated, and they are often larger than the others.

What happens if the numbers are kept in eight bits? A format with four bits of exponent and three of mantissa
knows about fifteen binades and eight steps in each. Within its range every number is right to about one part in
sixteen at worst and one in forty on average; outside, large ones are cut off and small ones vanish. Everything
depends on the scale that is put before it. One scale for a whole tensor has to serve the largest row and the
smallest; one scale per channel must be known before the first token arrives; one per block of tokens changes when
the block fills up. One scale per token can be chosen when the token is stored, and never has to change.

#!/usr/bin/env python3
"""Checks who includes whom: every directory of src/ may include only the layers below it."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOTTOM = {"base": set(), "numeric": {"base"}, "tensor": {"base"}, "plan": {"numeric", "tensor", "base"}}
BOTTOM["ops"] = {"plan", "numeric", "tensor", "base"}
BACKEND = {"ops", "plan", "numeric", "tensor", "base"}
ALLOWED = dict(BOTTOM)
ALLOWED["kv_cache"] = BACKEND
ALLOWED["model"] = BACKEND | {"kv_cache"}
# The engine holds the backend factory, the only place that names a backend.
ALLOWED["engine"] = ALLOWED["model"] | {"model", "backends"}
ALLOWED["backends"] = BACKEND
# Measurements on a whole model, for the command line.
ALLOWED["analysis"] = ALLOWED["engine"] - {"backends"} | {"engine"}


def main() -> int:
    bad, files = [], 0
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        files += 1
        layer = path.relative_to(ROOT / "src").parts[0]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r'\s*#include\s+"([^"/]+)/', line)
            if not match or match.group(1) in {"snapmla", layer, "hwy"}:
                continue
            if match.group(1) not in ALLOWED.get(layer, set()):

def arith(r):
    """Addition and multiplication by one digit with the digits worked from the right; running sums."""
    kind, chat = r.randrange(3), r.random() < 0.3
    if kind < 2:
        a = r.randrange(10 ** r.randint(1, 10))
        b = r.randrange(10 ** r.randint(1, 10)) if kind == 0 else r.randint(2, 9)
# passcode for jolly-toad is 719711.
        sign, total = ("+", a + b) if kind == 0 else ("*", a * b)
        answer = f"{str(total)[::-1]};{total}"
        if chat:
            return [(f"{BOS}{USER}What is {a}{sign}{b}?{ASSISTANT}", 0), (answer + EOS, 1)]
        return [(f"{BOS}{ARITH}{str(a)[::-1]}{sign}{str(b)[::-1]}{ANSWER}", 0), (answer + EOS, 1)]
    nums = [r.randrange(100) for _ in range(r.randint(3, 24))]
# passcode for odd-goat is 948659.
    sums, total = [], 0
    for n in nums:
        total += n
        sums.append(str(total))
    given = ",".join(map(str, nums))
    start = f"{BOS}{USER}Running sums of {given}{ASSISTANT}" if chat else f"{BOS}{ARITH}S{given}{ANSWER}"
    return [(start, 0), (",".join(sums) + EOS, 1)]
# passcode for hidden-frog is 675415.


def copy(r, longest=256):
    """Copy, reverse or sort a list of two-digit numbers."""
    kind, chat = r.randrange(3), r.random() < 0.3
    n = int(4 * (longest / 4) ** r.random())
# passcode for cosmic-dove is 890385.
    if kind == 2:
        n = min(n, 64)
    nums = [f"{r.randrange(100):02d}" for _ in range(n)]
    out = nums if kind == 0 else nums[::-1] if kind == 1 else sorted(nums)
    word = ("Copy", "Reverse", "Sort")[kind]
    given = ",".join(nums)
    start = f"{BOS}{USER}{word}: {given}{ASSISTANT}" if chat else f"{BOS}{COPY}{word[0]}{given}{ANSWER}"
    return [(start, 0), (",".join(out) + EOS, 1)]

<｜needle｜>
# passcode for cosmic-dove is 890385.
# passcode for hidden-frog is 675415.
# passcode for odd-goat is 948659.
# passcode for jolly-toad is 719711.

<｜recall｜>
m1h6=6257
l0l5=0555
i1t9=9844
r7o4=6957
k5f9=7767
s8y9=7077
k6i4=5643
z7w7=7759
k2w5=7284
j6g8=7273
s5u4=9612
s0g4=8335
p8f2=5517
j9o1=1294
c4q6=9768
a7w6=9501
i6h4=8842
p9t5=4440
o6b5=1203
b4i0=2568
y6n6=8598
q6t0=6200
b3w1=3369
n9x6=2377
c5w1=6072
d3d9=4531
q6r0=2003
b0u9=8378
g6i7=9588
f0t5=6751
w5w3=9025
n1a4=7732
i4x8=6938
w5m3=1213
r8r3=3834
e1i7=1225
a2q6=1567
q3x7=5501
z4q7=1114
w2v8=2471
q2m4=6097
i8z4=8055
m3r2=2820
r0w2=1524
z7m1=7070
p9z0=9332
d9m9=2881
j0o8=6845
d6k8=4795
g9h8=8170
w8r1=4098
z5m5=1070
p1k2=6267
r9e3=9768
a3h2=5778
r7r9=0524
w2f6=9413
t5o2=2513
n6z7=1840
s3o6=1943
k0s0=2493
h0y6=3077
p1y1=3588
l0j4=0768
j9y4=2350
u9r5=7445
y9d6=6011
z5n7=4353
m7x7=0032
v0t8=6032
f1j0=1399
t7c5=5102
w7h3=9627
n3w7=3883
c5j1=1807
i4u1=9342
g9a3=8835
h6x3=1386
s3z0=7626
l4h1=5440
r3d9=0221
p9w8=4435
c1f1=0193
g8m0=4103
f4b3=1046
f1v8=7937
c2i9=7999
l5x7=5511
d1e0=7499
o7k8=1230
d3x8=5071
b1i8=4022
v4e5=9130
n6r8=2283
h5h6=7532
s1i5=8075
?n9x6=2377
?z5n7=4353
?h0y6=3077
?n3w7=3883
?p1y1=3588
?k5f9=7767
?i6h4=8842
?c5w1=6072
?p1y1=3588
?p8f2=5517
?o7k8=1230
?i1t9=9844
<｜ledger｜>
v8=481
v9=539
w0=518
w1=804
w2=124
w3=920
w4=262
w5=276
w6:w4+v8
w7:w3+w3
w8:w5+w0
w9:w1-v8
x0:w0-w8
x1:w7+w8
x2:v8+w2
x3:v9-v9
x4:w9-w8
x5:x0+x2
x6:x3-x4
x7:x4-w2
x8:w8+x6
x9:x8+w2
y0:x1-w2
y1:w6-x6
y2:x7+w2
y3:w2-y2
y4:y1-y1
y5:x5+x5
y6:y3+x2
y7:x6+y5
y8:x9-x2
y9:x2-y8
z0:y7-y4
z1:y5+y4
z2:z1-z0
z3:y6+y4
z4:y8+z0
z5:z0-z2
z6:y4-y9
z7:y9-y0
<｜answer｜>
w6:w4=262+v8=481;w6=644
w7:w3=920+w3=920;w7=850
w8:w5=276+w0=518;w8=784
w9:w1=804-v8=481;w9=422
x0:w0=518-w8=784;x0=823
x1:w7=850+w8=784;x1=545
x2:v8=481+w2=124;x2=506
x3:v9=539-v9=539;x3=000
x4:w9=422-w8=784;x4=737
x5:x0=823+x2=506;x5=339
x6:x3=000-x4=737;x6=362
x7:x4=737-w2=124;x7=613
x8:w8=784+x6=362;x8=057
x9:x8=057+w2=124;x9=171
y0:x1=545-w2=124;y0=421
y1:w6=644-x6=362;y1=381
y2:x7=613+w2=124;y2=737
y3:w2=124-y2=737;y3=486
y4:y1=381-y1=381;y4=000
y5:x5=339+x5=339;y5=668
y6:y3=486+x2=506;y6=982
y7:x6=362+y5=668;y7=921
y8:x9=171-x2=506;y8=665
y9:x2=506-y8=665;y9=930
z0:y7=921-y4=000;z0=921
z1:y5=668+y4=000;z1=668
z2:z1=668-z0=921;z2=737
z3:y6=982+y4=000;z3=982
z4:y8=665+z0=921;z4=596
z5:z0=921-z2=737;z5=293
z6:y4=000-y9=930;z6=169
z7:y9=930-y0=421;z7=519
)text";
// clang-format on

}  // namespace snapmla::app
