from dataclasses import dataclass
class WriteReport: pass
def write_shifts(*a,**k): pass
