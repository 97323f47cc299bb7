theorem c_add_0 : 242 + 389 = 631 := by
  rfl

theorem c_add_1 : 995 + 394 = 1389 := by
  decide

theorem c_add_2 : 139 + 207 = 346 := by
  simp

theorem c_add_3 : 731 + 54 = 785 := by
  exact rfl

theorem c_add_4 : 97 + 150 = 247 := by
  rfl

theorem c_add_5 : 263 + 840 = 1103 := by
  decide

theorem c_add_6 : 528 + 224 = 752 := by
  simp

theorem c_add_7 : 420 + 667 = 1087 := by
  exact rfl

theorem c_mul_0 : 13 * 68 = 884 := by
  rfl

theorem c_mul_1 : 72 * 68 = 4896 := by
  decide

theorem c_mul_2 : 59 * 73 = 4307 := by
  simp

theorem c_mul_3 : 83 * 34 = 2822 := by
  rfl

theorem c_mul_4 : 61 * 21 = 1281 := by
  decide

theorem c_mul_5 : 72 * 39 = 2808 := by
  simp

theorem c_mul_6 : 12 * 44 = 528 := by
  rfl

theorem c_mul_7 : 76 * 62 = 4712 := by
  decide

theorem c_lt_0 : 252 < 447 := by
  decide

theorem c_lt_1 : 381 < 440 := by
  simp

theorem c_lt_2 : 349 < 482 := by
  exact Nat.le_of_ble_eq_true rfl

theorem c_lt_3 : 59 < 92 := by
  decide

theorem c_lt_4 : 207 < 525 := by
  simp

theorem c_lt_5 : 434 < 628 := by
  exact Nat.le_of_ble_eq_true rfl

theorem c_mod_0 : 210 % 24 = 18 ∧ 210 / 24 = 8 := by
  decide

theorem c_mod_1 : 159 % 13 = 3 ∧ 159 / 13 = 12 := by
  simp

theorem c_mod_2 : 340 % 25 = 15 ∧ 340 / 25 = 13 := by
  exact ⟨rfl, rfl⟩

theorem c_mod_3 : 188 % 18 = 8 ∧ 188 / 18 = 10 := by
  decide

theorem c_mod_4 : 765 % 19 = 5 ∧ 765 / 19 = 40 := by
  simp

theorem c_mod_5 : 312 % 21 = 18 ∧ 312 / 21 = 14 := by
  exact ⟨rfl, rfl⟩

theorem c_dvd_0 : 7 ∣ 49 := by
  decide

theorem c_dvd_1 : 4 ∣ 136 := by
  exact ⟨34, rfl⟩

theorem c_dvd_2 : 9 ∣ 108 := by
  simp

theorem c_dvd_3 : 17 ∣ 527 := by
  exact Nat.dvd_of_mod_eq_zero rfl

theorem c_dvd_4 : 12 ∣ 456 := by
  decide

theorem c_ex_0 : ∃ n : Nat, n * n = 625 ∧ n < 26 := by
  exact ⟨25, rfl, by decide⟩

theorem c_ex_1 : ∃ n : Nat, n * n = 900 ∧ n < 31 := by
  exists 30

theorem c_ex_2 : ∃ n : Nat, n * n = 121 ∧ n < 12 := by
  refine ⟨11, ?_, ?_⟩ <;> decide

theorem c_ex_3 : ∃ n : Nat, n * n = 169 ∧ n < 14 := by
  exact ⟨13, by simp⟩

theorem c_ex_4 : ∃ n : Nat, n * n = 81 ∧ n < 10 := by
  constructor; exact ⟨show 9 * 9 = 81 from rfl, by decide⟩

theorem c_ne_0 : 78 + 188 ≠ 267 := by
  decide

theorem c_ne_1 : 50 + 189 ≠ 240 := by
  simp

theorem c_ne_2 : 55 + 182 ≠ 238 := by
  intro h; contradiction

theorem c_ne_3 : 73 + 164 ≠ 238 := by
  intro h; exact absurd h (by decide)

theorem c_ne_4 : 89 + 125 ≠ 215 := by
  nofun
