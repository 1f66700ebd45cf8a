"""`make demo`: one host end to end, on a real target, with a real guest and a real crash."""
