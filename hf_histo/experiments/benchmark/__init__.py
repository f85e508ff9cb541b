"""How fast this package is: each part is timed beside what others do, and beside the least that it must take.

`measure` runs the parts, `ratios` compares, `report` writes. What a part times: `peers` and `steps` (training),
`prediction`, `features`, `reading`, `jobs` (commands from start to end, and several processes).
"""
