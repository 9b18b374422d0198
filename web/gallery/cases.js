const cases = ["P01_S008", "P15_S009"];
