"""Forecasts: how long requests will take, how sure that is, and how it sharpens as they run.

Pure: numpy and the standard library, no files, no clock. Times are seconds, sizes are tokens,
bytes where a name says so. The way through it: `workload` (what is to be run), `measurement` (what
was measured), `forecast.Forecaster` (the one from the other), `live.LiveForecast` (while it runs),
`recording.Recording` (what a run leaves for the next ones).
"""
