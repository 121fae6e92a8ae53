"""What a study is: options, run folder, parts, trials, claims and result; the only room that all studies share."""
