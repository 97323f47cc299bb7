theorem n_zero_add (n : Nat) : 0 + n = n := by
  induction n with
  | zero => rfl
  | succ n ih => rw [← Nat.add_assoc, ih]

theorem n_add_zero (n : Nat) : n + 0 = n := by
  rfl

theorem n_add_comm (a b : Nat) : a + b = b + a := by
  exact Nat.add_comm a b

theorem n_add_comm_ind (a b : Nat) : a + b = b + a := by
  induction b with
  | zero => simp
  | succ b ih => rw [← Nat.add_assoc, ih, Nat.add_one_add]

theorem n_add_assoc (a b c : Nat) : a + b + c = a + (b + c) := by
  rw [Nat.add_assoc]

theorem n_shuffle (a b c : Nat) : a + b + c = c + b + a := by
  rw [Nat.add_comm a b, Nat.add_comm (b + a) c, Nat.add_assoc]

theorem n_shuffle_simp (a b c d : Nat) : a + b + (c + d) = d + c + (b + a) := by
  simp [Nat.add_comm, Nat.add_left_comm]

theorem n_mul_comm (a b : Nat) : a * b = b * a := by
  rw [Nat.mul_comm]

theorem n_mul_add (a b c : Nat) : a * (b + c) = a * b + a * c := by
  exact Nat.mul_add a b c

theorem n_add_mul_ind (a b c : Nat) : (a + b) * c = a * c + b * c := by
  induction c with
  | zero => rfl
  | succ c ih => rw [Nat.mul_add_one, ih, Nat.mul_add_one, Nat.mul_add_one]; simp [Nat.add_comm, Nat.add_left_comm, Nat.add_assoc]

theorem n_two_mul (n : Nat) : 2 * n = n + n := by
  rw [Nat.two_mul]

theorem n_square (a b : Nat) : (a + b) * (a + b) = a * a + 2 * (a * b) + b * b := by
  rw [Nat.mul_add, Nat.add_mul, Nat.add_mul, Nat.mul_comm b a, Nat.two_mul]
  simp [Nat.add_assoc]

theorem n_mul_zero (n : Nat) : n * 0 = 0 := by
  simp

theorem n_zero_mul_ind (n : Nat) : 0 * n = 0 := by
  induction n with
  | zero => rfl
  | succ n ih => rw [Nat.mul_add_one, ih]

theorem n_cancel (a b c : Nat) (h : a + c = b + c) : a = b := by
  exact Nat.add_right_cancel h

theorem n_cancel_simp (a b c : Nat) (h : a + c = b + c) : a = b := by
  simpa using h

theorem n_succ_inj (a b : Nat) (h : a + 1 = b + 1) : a = b := by
  injection h

theorem n_succ_ne (n : Nat) : n + 1 ≠ 0 := by
  simp

theorem n_succ_ne_intro (n : Nat) : n + 1 ≠ 0 := by
  intro h
  contradiction

theorem n_ne_succ_self (n : Nat) : n ≠ n + 1 := by
  induction n with
  | zero => decide
  | succ n ih =>
    intro h
    exact ih (Nat.add_right_cancel h)

theorem n_zero_or_succ (n : Nat) : n = 0 ∨ ∃ m, n = m + 1 := by
  cases n with
  | zero => exact Or.inl rfl
  | succ m => exact Or.inr ⟨m, rfl⟩

theorem n_solve (n : Nat) (h : n + 2 = 5) : n = 3 := by
  simp at h
  exact h

theorem n_solve_inj (n : Nat) (h : n + 3 = 7) : n = 4 := by
  exact Nat.add_right_cancel h

theorem n_solve_two (x y : Nat) (h : x = 3) (k : y = x + 2) : y = 5 := by
  rw [k, h]

theorem n_solve_subst (x y : Nat) (h : x = 3) (k : y = x + 2) : y = 5 := by
  subst h
  exact k

theorem n_solve_simp (x y : Nat) (h : x = 3) (k : y = x * 2) : x + y = 9 := by
  simp [h, k]

theorem n_le_refl (n : Nat) : n ≤ n := by
  simp

theorem n_le_trans (a b c : Nat) (h : a ≤ b) (k : b ≤ c) : a ≤ c := by
  exact Nat.le_trans h k

theorem n_le_trans_calc (a b c d : Nat) (h : a ≤ b) (k : b = c) (l : c ≤ d) : a ≤ d := by
  calc a ≤ b := h
    _ = c := k
    _ ≤ d := l

theorem n_lt_trans_calc (a b c : Nat) (h : a < b) (k : b ≤ c) : a < c + 1 := by
  calc a < b := h
    _ ≤ c := k
    _ ≤ c + 1 := Nat.le_succ c

theorem n_lt_irrefl (n : Nat) : ¬n < n := by
  exact Nat.lt_irrefl n

theorem n_lt_ne (a b : Nat) (h : a < b) : a ≠ b := by
  rintro rfl
  exact Nat.lt_irrefl a h

theorem n_lt_asymm (a b : Nat) (h : a < b) : ¬b < a := by
  intro k
  exact Nat.lt_irrefl a (Nat.lt_trans h k)

theorem n_le_antisymm (a b : Nat) (h : a ≤ b) (k : b ≤ a) : a = b := by
  exact Nat.le_antisymm h k

theorem n_le_total (a b : Nat) : a ≤ b ∨ b ≤ a := by
  exact Nat.le_total a b

theorem n_trichotomy (a b : Nat) : a < b ∨ a = b ∨ b < a := by
  exact Nat.lt_trichotomy a b

theorem n_not_le (a b : Nat) : ¬a ≤ b ↔ b < a := by
  simp

theorem n_le_add (a b : Nat) : a ≤ a + b := by
  simp

theorem n_le_add_left (a b : Nat) : a ≤ b + a := by
  exact Nat.le_add_left a b

theorem n_add_le_add (a b c d : Nat) (h : a ≤ b) (k : c ≤ d) : a + c ≤ b + d := by
  exact Nat.add_le_add h k

theorem n_exists_add (a b : Nat) (h : a ≤ b) : ∃ c, b = a + c := by
  exact Nat.exists_eq_add_of_le h

theorem n_exists_add_ind (a b : Nat) (h : a ≤ b) : ∃ c, b = a + c := by
  induction h with
  | refl => exact ⟨0, rfl⟩
  | step _ ih =>
    obtain ⟨c, hc⟩ := ih
    exact ⟨c + 1, by rw [hc]; rfl⟩

theorem n_pos (n : Nat) (h : n ≠ 0) : 0 < n := by
  exact Nat.pos_of_ne_zero h

theorem n_pos_cases (n : Nat) (h : n ≠ 0) : 0 < n := by
  cases n with
  | zero => contradiction
  | succ m => simp

theorem n_lt_succ (a b : Nat) : a < b + 1 ↔ a ≤ b := by
  exact Nat.lt_add_one_iff

theorem n_mul_le (a b c : Nat) (h : a ≤ b) : c * a ≤ c * b := by
  exact Nat.mul_le_mul_left c h

theorem n_mul_pos (a b : Nat) (h : 0 < a) (k : 0 < b) : 0 < a * b := by
  exact Nat.mul_pos h k

theorem n_mul_cancel (a b c : Nat) (h : 0 < c) (k : c * a = c * b) : a = b := by
  exact Nat.eq_of_mul_eq_mul_left h k

theorem n_mul_eq_zero (a b : Nat) (h : a * b = 0) (k : a ≠ 0) : b = 0 := by
  simp at h
  cases h with
  | inl h => contradiction
  | inr h => exact h

theorem n_sub_self (n : Nat) : n - n = 0 := by
  simp

theorem n_add_sub (a b : Nat) : a + b - b = a := by
  exact Nat.add_sub_cancel a b

theorem n_sub_add (a b : Nat) (h : b ≤ a) : a - b + b = a := by
  exact Nat.sub_add_cancel h

theorem n_sub_zero_iff (a b : Nat) : a - b = 0 ↔ a ≤ b := by
  simp

theorem n_sub_le (a b : Nat) : a - b ≤ a := by
  induction b with
  | zero => simp
  | succ b ih => exact Nat.le_trans (Nat.pred_le (a - b)) ih

theorem n_pow_zero (n : Nat) : n ^ 0 = 1 := by
  rfl

theorem n_pow_two (n : Nat) : n ^ 2 = n * n := by
  rw [Nat.pow_two]

theorem n_one_pow (n : Nat) : 1 ^ n = 1 := by
  induction n with
  | zero => rfl
  | succ n ih => rw [Nat.pow_succ, ih]

theorem n_pow_add (a m n : Nat) : a ^ (m + n) = a ^ m * a ^ n := by
  exact Nat.pow_add a m n

theorem n_pow_pos (n : Nat) : 0 < 2 ^ n := by
  exact Nat.pow_pos (by decide) n

theorem n_lt_pow (n : Nat) : n < 2 ^ n := by
  induction n with
  | zero => decide
  | succ n ih =>
    calc n + 1 ≤ 2 ^ n := ih
      _ < 2 ^ n + 2 ^ n := Nat.lt_add_of_pos_right (Nat.pow_pos (by decide) n)
      _ = 2 ^ (n + 1) := by rw [Nat.pow_succ, Nat.mul_two]

theorem n_max_left (a b : Nat) : a ≤ max a b := by
  exact Nat.le_max_left a b

theorem n_min_self (n : Nat) : min n n = n := by
  simp

theorem n_min_le (a b : Nat) : min a b ≤ a := by
  rw [Nat.min_def]
  split
  · exact Nat.le_refl a
  · next h => exact Nat.le_of_lt (Nat.lt_of_not_le h)

theorem n_strong (p : Nat → Prop) (h : ∀ n, (∀ m, m < n → p m) → p n) (n : Nat) : p n := by
  induction n using Nat.strongRecOn with
  | _ n ih => exact h n ih

theorem n_two_step (p : Nat → Prop) (h0 : p 0) (h1 : p 1) (h : ∀ n, p n → p (n + 2)) (n : Nat) : p n := by
  have both : p n ∧ p (n + 1) := by
    induction n with
    | zero => exact ⟨h0, h1⟩
    | succ n ih => exact ⟨ih.2, h n ih.1⟩
  exact both.1

theorem n_decide_lt : 10 < 20 ∧ 5 * 7 = 35 := by
  decide

theorem n_decide_ne : 123 ≠ 321 := by
  decide

theorem n_simp_lit : 2 ^ 10 = 1024 ∧ 17 % 5 = 2 ∧ 100 / 7 = 14 := by
  simp

theorem n_rfl_big : 123456789 * 987654321 = 121932631112635269 := by
  rfl

theorem n_kernel : 3 ^ 20 = 3486784401 := by
  decide +kernel

theorem n_rw_at (a b c : Nat) (h : a = b) (k : a + c = 7) : b + c = 7 := by
  rw [h] at k
  exact k

theorem n_conv (a b c : Nat) : a + b * c = a + c * b := by
  conv =>
    lhs
    rw [Nat.mul_comm]

theorem n_generalize (a b : Nat) (f : Nat → Nat) (h : ∀ x, f x = x) : f (a + b) = a + b := by
  generalize a + b = c
  exact h c

theorem n_double_ind (n : Nat) : n + n = 2 * n := by
  induction n with
  | zero => rfl
  | succ n ih =>
    rw [Nat.mul_add, ← ih]
    simp [Nat.add_comm, Nat.add_left_comm, Nat.add_assoc]

theorem n_match (n : Nat) : n = 0 ∨ 0 < n :=
  match n with
  | 0 => Or.inl rfl
  | m + 1 => Or.inr (Nat.zero_lt_succ m)

theorem n_le_cases (n : Nat) (h : n ≤ 2) : n = 0 ∨ n = 1 ∨ n = 2 := by
  match n, h with
  | 0, _ => simp
  | 1, _ => simp
  | 2, _ => simp

theorem n_even_sum (m n : Nat) (h : Even m) (k : Even n) : Even (m + n) := by
  exact h.add k

theorem n_even_sum_long (m n : Nat) (h : Even m) (k : Even n) : Even (m + n) := by
  obtain ⟨a, ha⟩ := h
  obtain ⟨b, hb⟩ := k
  refine ⟨a + b, ?_⟩
  rw [ha, hb]
  simp [Nat.add_assoc, Nat.add_left_comm]

theorem n_even_double (n : Nat) : Even (n + n) := by
  exact ⟨n, rfl⟩

theorem n_even_or_odd (n : Nat) : Even n ∨ Odd n := by
  exact Nat.even_or_odd n

theorem n_even_decide : Even 10 ∧ Odd 7 ∧ ¬Even 3 := by
  decide

theorem n_odd_odd (m n : Nat) (h : Odd m) (k : Odd n) : Even (m + n) := by
  exact h.add_odd k

theorem n_dvd_refl (n : Nat) : n ∣ n := by
  simp

theorem n_dvd_trans (a b c : Nat) (h : a ∣ b) (k : b ∣ c) : a ∣ c := by
  exact Nat.dvd_trans h k

theorem n_dvd_trans_long (a b c : Nat) (h : a ∣ b) (k : b ∣ c) : a ∣ c := by
  obtain ⟨x, rfl⟩ := h
  obtain ⟨y, rfl⟩ := k
  exact ⟨x * y, by rw [Nat.mul_assoc]⟩

theorem n_dvd_add (a b c : Nat) (h : a ∣ b) (k : a ∣ c) : a ∣ b + c := by
  exact Nat.dvd_add h k

theorem n_dvd_mul (a b c : Nat) (h : a ∣ b) : a ∣ b * c := by
  obtain ⟨d, hd⟩ := h
  refine ⟨d * c, ?_⟩
  rw [hd, Nat.mul_assoc]

theorem n_dvd_decide : 7 ∣ 91 ∧ ¬7 ∣ 92 := by
  decide

theorem n_dvd_succ (n : Nat) : 2 ∣ n * (n + 1) := by
  induction n with
  | zero => simp
  | succ n ih =>
    have e : (n + 1) * (n + 1 + 1) = n * (n + 1) + 2 * (n + 1) := by
      rw [Nat.mul_comm, ← Nat.add_mul]
    rw [e]
    exact Nat.dvd_add ih (Nat.dvd_mul_right 2 (n + 1))

theorem n_dvd_antisymm (a b : Nat) (h : a ∣ b) (k : b ∣ a) : a = b := by
  exact Nat.dvd_antisymm h k

theorem n_mod_lt (n m : Nat) (h : 0 < m) : n % m < m := by
  exact Nat.mod_lt n h

theorem n_mod_two (n : Nat) : n % 2 = 0 ∨ n % 2 = 1 := by
  exact Nat.mod_two_eq_zero_or_one n

theorem n_div_mod (n m : Nat) : m * (n / m) + n % m = n := by
  exact Nat.div_add_mod n m

theorem n_mod_add (n m : Nat) : (n + m) % m = n % m := by
  simp

theorem n_dvd_iff_mod (a b : Nat) : a ∣ b ↔ b % a = 0 := by
  exact Nat.dvd_iff_mod_eq_zero

theorem n_mul_mod (a b : Nat) : a * b % a = 0 := by
  simp
