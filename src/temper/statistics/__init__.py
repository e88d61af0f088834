"""Statistics for studies: how sure a number is, what was too small to see, and what law numbers follow. Plain functions of arrays.

| module | answers |
|---|---|
| `bootstrap` | how far a figure would move with other seeds and other examples: the multi-bootstrap, intervals, p-values |
| `tests` | whether paired differences lie above a margin: t, signed ranks, McNemar, 5x2 cross-validation, Cochran's Q |
| `corrections` | p-values of several tests together: Holm, Bonferroni, Benjamini and Hochberg |
| `effects` | how large a difference is beside its spread: Cohen's d_z, Hedges' g, Cliff's delta, odds ratio |
| `power` | which difference so many seeds or examples would find, and how many are needed |
| `resampling` | which rows teach and which test: holdout, folds, nested folds, 5x2, bootstrap; the .632 and .632+ estimates |
| `fits` | laws through points, many bootstrap draws at once; forecasts of where a learning curve ends |
| `passing` | rare successes: sampling until so many passes, its estimates, interval and bias |
| `emergence` | what a metric alone makes of steady progress: p^L, token edit distance |

All is float64 and deterministic: what is drawn follows from `seed`. Numbers that are none (NaN, infinite) are refused with a `Problem`.
"""
