"""The text of docs/judges.md: how claims are judged, how often that errs, what changed.

Numbers come from the simulations of ``judging`` and from earlier results.
"""

from pathlib import Path

from benchmarks.reproduce.earlier import crossings_and_ends
from benchmarks.reproduce.judging import __main__ as judges
from benchmarks.reproduce.judging.order import FEWEST_SETS

_TEXT = """# How the claims are judged

A *judge* is a statistical test that gives a verdict on a claim of the
[page of results](results.md). This page says how each judge works, what is known to
fool it, how often it errs in simulations, and what was changed over time. Terms such as
*farther*, *gap* and *oracle* are [explained there](results.md#how-to-read-this-page).

## How each judge works

**Two sides.** Every claim is tested on both sides, each at 2.5 %: it is *borne out* if
chance gives an effect as favourable in at most 2.5 % of the cases, *not borne out* if
it gives one as unfavourable in at most 2.5 %, and otherwise *undecided*. A claim with
several parts is borne out only if all its parts are. It is not borne out only if one
part would be so after Holm's correction for their number, because one of many true
parts fails by chance. Otherwise one part that is not testable makes the claim *not
testable yet*, and any other mixture makes it *undecided*.

**Sets and trainings.** All trainings that unlearn a set share its images and its
oracles. So the trainings are averaged first, and the test permutes the sets: how often
would a random order of the sets look as clear? At least {fewest} sets are needed. The
differences between the trainings are added to this error, since the claims are about
other sets and about other trainings.

**Farther** compares the gap before unlearning, the signed distance of a measure from
the mean oracle. It is tested on all sets. The harder half of the sets must start more
than five points from their oracles on average.

**Slower** compares the share of the gap that remained, on average over the run. It is
compared as an angle, whose tangent is the share, because the share itself jumps where
noise makes a gap 0 or less. The movement of the same measure on retained images is
subtracted from the gap, because a loss of accuracy on all images is no unlearning.
Forgotten images may not share this movement, so the verdict must be the same without
the subtraction. By UA it must also be the same if forgotten images end with as many
more errors than the oracles make as test images do. Otherwise it is *undecided*.

Only sets with a gap of more than five points are judged. One training and one oracle
choose these sets, and the others measure them. Every training and every oracle chooses
in turn. A verdict stands if two thirds of these choices give it, and their number is
shown. *Slower* is *not testable yet* unless all these conditions hold:

- At least {fewest} sets have such a gap.
- A run has at least eight epochs, and on average closes at most half of the gap in the
  first one.
- At least a fifth of the gap is closed in total, and more than it varies between sets
  and between trainings. As in the condition before, the movement of retained images is
  subtracted.
- The measure on retained images moved by at most five points, up or down, on average
  over the run.
- No set overshot its oracles by more than five points, on average over the trainings.
- No run cost more than five points of test accuracy.

Farther and slower both need at least five trainings and three oracles for each set. A
trend over the sets of one data set may come from a few classes that differ. It is
claimed for this data set only. The first epoch within five points, which is the paper's
number, is stored too. It says little: a run can cross the five points and move on.

**Larger on average** (fig1-right, fig5) compares two values of each set, such as the
gap before and after the run, as a share of the larger one. The test bets on each set
and assumes no distribution. Its price is power. The interval beside it is Student's,
which does assume one. So an interval can exclude 0 although the claim is undecided.

**Two groups of sets** (fig3, methods, attack) are compared by permuting the sets, and
Welch's test must agree. The interval is Welch's. Figure 3 compares four sets with four
others. Of their 70 divisions one is the most extreme, so p is at least 0.0143, and the
claim with its 12 parts cannot be refuted. Figure 8 compares the smallest
with the largest size of the forget sets, and no other.

**Alike** (fig1-right, fig4, fig5) means that every set lies within a fixed margin: five
points of accuracy and a factor of 1.25 in a bound between any two sets, and 1.5 times
the barrier between a set's own oracles. A one-sided 97.5 % limit over trainings must
lie within the margin, so noise leaves the claim undecided instead of confirming it. The
claim is about the sets that were measured, in trainings like those that were run. The
baseline of fig1-right needs ten pairs of oracles, so each set has five oracles there.

**Correlations over images** (fig2, fig9, ranks, literal, attack) have the class as
their unit, because images of one class resemble each other. They are measured within
each class, so scores that only tell classes apart do not correlate. Classes of fewer
than 30 images are left out. The mean over classes must be above a limit both as it is
and after Fisher's artanh. So must a lead over another correlation, which is shown after
artanh.

**Intervals** are two-sided 95 % intervals and show how large an effect is. Verdicts
follow from the p-values, which are one-sided, of the named side, and compared with
2.5 %. The two need not agree where a judge uses another interval than its test.

## What is known to fool the judges

These cases fool a judge, or are not judged. Rates of most of them are in the tables
below, under *Known to fool this judge*.

- **Groups of sets and separations** (fig3, fig8, methods): sets that are rare and far
  below the others are often not drawn, so that a mean of 0 looks positive. With one
  such set in ten or in twenty, more than 40 % of the simulated studies confirm a
  difference that does not exist, and still 10 % if 40 % of the sets are far below.
- **Rare trainings** (all judges): what happens in one training of six is often not
  among five. Accuracies are called alike although one set fails in some runs. If
  trainings are of two kinds, 5 % of the studies with five trainings find an order that
  is not there on average, and 1 % of those with ten. An order is not judged with fewer
  than five.
- **Classes** (all judges of an order): over other classes the trend may be absent.
- **Rare classes** (fig2, fig9, ranks, literal): if one class in ten is far below the
  limit of a correlation, ten classes often contain none, and a third of the simulated
  studies find the mean above the limit. The claim is about the classes of this data
  set.
- **Neighbours in the ranking** (all tests over sets): if sets next to each other
  resemble each other, there are fewer independent sets than the test counts. With a
  correlation of 0.8 between neighbours, a quarter of the simulated studies find an
  order that is not there. With sets of three kinds, 11 % find a mean difference.
- **Trainings that rank** (all claims about forget sets): the images are ranked by the
  ledgers of the same trainings that are then unlearned. The claims are about trainings
  whose ledgers rank the sets. In other trainings the same sets may show no order.
- **Damage that depends on difficulty** (*slower*): only the mean movement of retained
  images is subtracted. If a method hurts hard images more than others, it looks faster
  on hard sets.
- **As many points on all sets** (*slower*): they are a large share of a small gap. If
  all sets overshoot by up to 4.5 points for some epochs, the easy ones look faster, and
  6.5 % of the simulated studies find hard sets slower. If all stop some points short of
  the oracles, easy sets look slower. Where such an offset is not seen on retained or
  test images, nothing corrects it.
- **Budgets from the loss** (predicted) are described and not judged. The mean gain is
  so small beside its spread over sets that no test of 20 sets has any power.

## How often the judges err

Each judge was given simulated studies whose truth is known. The tables say how often it
gave each verdict. Where the *claim is false*, *borne out* is an error. Each test is
made for 2.5 %, and a rate above 5 % counts as a case that fools the judge. Where the
claim is true, *not borne out* is an error, and the column *borne out* is the power. An
error rate of 5 % in 200 studies has a standard error of 1.5 points. The tables cover
the simulated cases only. The names in parentheses are the figures that use the judge.

{judges}
## What changed, and why

The oldest change stands first.

### Correlations, means and alike

The test of correlations took the images for independent, although those of one class
resemble each other. It now needs their classes, and the results of fig2, fig9, ranks
and literal were stored without them. So these four claims became *not testable yet* for
one version of the page, until they were measured again. Means over sets were confirmed
where rare sets could have turned them around. Accuracies were called alike although one
set differed, and noise alone could confirm that a bound does not rise.

### From five sets to twenty

Earlier versions tested the order of five sets with the training as the unit. Three of
the five start at the oracles, so the order of the other two could not change the
verdict: the claims about times were borne out whatever happened. These claims are
measured again with 20 forget sets, one figure after the other, and are *not testable
yet* until then. The table counts, for all methods of the earlier run, the runs that
came within five points of the oracles at some epoch. Many of them ended outside, or
lost more than five points of test accuracy.

{crossings}

### The search of settings

Two more errors were found. The search of settings made 8 trials, all of them random:
every method with one setting tried the same eight rates, none above 0.061. And it ran
on a random forget set, on which there was hardly anything to forget. It now has 5
random trials of 25, rates from 0.001 to 1, and a set of hard images of its own.
Settings that cost test accuracy are ruled out, and the result says if the search could
not distinguish the settings.

### First attack by simulated data, 30 November 2026

A statistician from outside attacked the judges with simulated data. The judges were
changed before any figure was measured by them:

- *Slower* took a loss of accuracy on all images for unlearning. In up to 100 % of the
  studies without the effect it was borne out. The movement of retained images is now
  subtracted.
- An order was tested against 0 on one side and against 0.5 on the other, so that a weak
  true order was not borne out in up to 48 %. Now both sides test 0.
- The first training and the first oracle chose the sets, and other ones gave another
  verdict in 55 to 74 % of the studies near five points. Now two thirds of all choices
  must agree.
- Separations of speeds were compared on different sets at two sizes. They are now
  compared at the same positions in the ranking.
- "The hardest sets are slowest" compared them with the mean of the others, and is now
  called so.
- Many parts, and pairs of noises, are now corrected for their number.
- A few almost perfect correlations outweighed others, and classes of two or three
  images counted. Now means must pass with and without artanh, and a class needs 30
  images.
- A barrier is called too high only if it also exceeds the multiple of the mean baseline
  of all sets.
- Oracles of different sets no longer share their seeds.

### The limits of the search

The first runs with these judges showed a third error of the search. Its limits held
after the run only, and of the good settings it chose the fastest. At that rate
fine-tuning raised the error on retained images by nine points in its first epoch and
closed more than half of the gap at once, and L1-sparse unlearning did so still more.
Later epochs repaired the model. Speeds could not be judged (fig1-middle, fig5, fig6).
The limits now hold at every evaluation, for retained images as well.

The runs were made again, with 10 epochs instead of 15, and the figure rates with the
rates 0.05, 0.07 and 0.09 instead of 0.03, 0.06, 0.12 and 0.24: at 0.03 nothing was
unlearned, and 0.12 damaged the model first. These choices were made by the share of the
gap that was closed, the movement of retained images and overshooting. The order of the
speeds had not been looked at.

### Second attack by simulated data, 30 November 2026

The second attack fooled *slower* again. If the measure on retained images moved by
three points and forgotten images did not follow, 78 % of the studies of equal speed
were borne out, or a weak true difference was not borne out in 61 %. If forgotten and
test images ended two points worse than with the oracles, 9 % were borne out.

A verdict on speeds must now be the same by each account of what forgotten images share
with others. None of these studies is fooled any more, and the power falls from 74 to
69 % in the simulated case that is most like the measured sets. Where the measure on all
retained images falls by three points, even sets that are 2.7 times slower are no longer
found (before: 90 %): the numbers cannot tell this from a movement that forgotten images
do not share. In the first three epochs of fig1-middle, retained images moved by one to
two points (UA). With this subtracted the rank correlation of slowness with difficulty
is -0.93 to -0.79, without it -0.76 to -0.34, depending on the choice of the sets.

The best proxy must lead with and without artanh. Before, one that led only in classes
near 1 was called best in all studies. The 97.5 % limit of a barrier took the mean of
pairs of five oracles for more exact than it is. With rare oracles without a barrier it
erred in 19 % of the studies, and now in 0.5 %. Its power falls from 78 to 58 % in one
simulated case. Five further cases were added to the list of those that fool judges.

The change was adopted when fig1-middle and fig5 had been judged, and it changed their
verdicts: by UA, hard sets were *not slower*, and MIA approached the oracle's. Both are
now *undecided*.

### Tables, 1 December 2026

Figure 1 (right) now trains five oracles for each set, because its baseline needs ten
pairs. The pages have tables of effects in place of lists, and the judges have a page of
their own. A correlation was called *weak* if its interval was below 0.5. The interval
shows this, so the word is gone. For speeds the tables show the effect of the median
choice of the sets, and no longer that of the most common or the first one. No verdict
changed.

### Rates and noise, 1 December 2026

The figure rates had been run at 0.05, 0.07 and 0.09, and fig1-left with σ = 0.005 and
0.02. Both were *not testable yet*, because of the outer values alone. They were run
again with 0.06, 0.07 and 0.08, and with 0.005 and 0.01. The new values were chosen
because speeds could not be judged at the old ones, but what these showed was known:

- *Farther* was borne out at all of them, with correlations of 0.99 at both rates, and
  of 0.80 (UA) and 0.64 (MIA) with σ = 0.02.
- At rate 0.05, fine-tuning closed 2 % (UA) and 17 % (MIA) of the gap; at least 20 % are
  needed.
- At rate 0.09, the measure moved by 0.057 on retained images by MIA; at most 0.05 can
  be judged. By UA, *slower* was undecided: its correlations were -0.91 to -0.46 if
  forgotten images share the movement of retained ones, and 0.05 to 0.43 if they do not.
- With σ = 0.02, 6 or 7 sets had something to forget; at least 8 are needed.
"""


def judges_page(earlier: Path) -> str:
    """Return the text of docs/judges.md.

    Args:
        earlier: The folder of earlier results.
    """
    return _TEXT.format(
        fewest=FEWEST_SETS,
        judges=judges.table(judges.stored()),
        crossings=crossings_and_ends(earlier),
    )
