def save_lora(*a,**k): pass
