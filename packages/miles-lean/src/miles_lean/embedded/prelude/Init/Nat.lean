/-
Natural numbers: addition, multiplication, order, subtraction, powers, parity.
-/
prelude
import Init.SimpLemmas

set_option linter.unusedVariables false

namespace Nat

@[elab_as_elim, induction_eliminator] protected noncomputable abbrev recAux {motive : Nat → Sort u} (zero : motive 0) (succ : ∀ n, motive n → motive (n + 1)) (t : Nat) :
    motive t :=
  Nat.rec zero succ t
@[elab_as_elim, cases_eliminator] protected noncomputable abbrev casesAuxOn {motive : Nat → Sort u} (t : Nat) (zero : motive 0) (succ : ∀ n, motive (n + 1)) : motive t :=
  Nat.rec zero (fun n _ => succ n) t

/-! ### Addition and multiplication -/
@[simp] theorem add_eq {x y : Nat} : Nat.add x y = x + y := rfl
@[simp] theorem mul_eq {x y : Nat} : Nat.mul x y = x * y := rfl
@[simp] theorem sub_eq {x y : Nat} : Nat.sub x y = x - y := rfl
@[simp] theorem lt_eq {x y : Nat} : Nat.lt x y = (x < y) := rfl
@[simp] theorem le_eq {x y : Nat} : Nat.le x y = (x ≤ y) := rfl
@[simp] theorem succ_eq_add_one (n : Nat) : Nat.succ n = n + 1 := rfl
@[simp] theorem zero_eq : Nat.zero = 0 := rfl
theorem add_one (n : Nat) : n + 1 = Nat.succ n := rfl
theorem add_succ (n m : Nat) : n + Nat.succ m = Nat.succ (n + m) := rfl
theorem add_add_one (n m : Nat) : n + (m + 1) = n + m + 1 := rfl
@[simp] protected theorem add_zero (n : Nat) : n + 0 = n := rfl
@[simp] protected theorem zero_add (n : Nat) : 0 + n = n := by
  induction n with
  | zero => rfl
  | succ n ih => exact congrArg Nat.succ ih
theorem succ_add (n m : Nat) : Nat.succ n + m = Nat.succ (n + m) := by
  induction m with
  | zero => rfl
  | succ m ih => exact congrArg Nat.succ ih
theorem add_one_add (n m : Nat) : n + 1 + m = n + m + 1 := succ_add n m
protected theorem add_comm (n m : Nat) : n + m = m + n := by
  induction m with
  | zero => exact (Nat.zero_add n).symm
  | succ m ih => exact (congrArg Nat.succ ih).trans (succ_add m n).symm
protected theorem add_assoc (n m k : Nat) : n + m + k = n + (m + k) := by
  induction k with
  | zero => rfl
  | succ k ih => exact congrArg Nat.succ ih
protected theorem add_left_comm (n m k : Nat) : n + (m + k) = m + (n + k) := by
  rw [← Nat.add_assoc, Nat.add_comm n m, Nat.add_assoc]
protected theorem add_right_comm (n m k : Nat) : n + m + k = n + k + m := by
  rw [Nat.add_assoc, Nat.add_comm m k, ← Nat.add_assoc]
theorem succ.inj' {n m : Nat} (h : Nat.succ n = Nat.succ m) : n = m := congrArg Nat.pred h
theorem succ_inj {n m : Nat} : Nat.succ n = Nat.succ m ↔ n = m := ⟨succ.inj', congrArg _⟩
@[simp] theorem add_right_cancel_iff {m k n : Nat} : m + n = k + n ↔ m = k := by
  induction n with
  | zero => exact Iff.rfl
  | succ n ih => exact ⟨fun h => ih.mp (succ.inj' h), fun h => h ▸ rfl⟩
@[simp] theorem add_left_cancel_iff {m k n : Nat} : n + m = n + k ↔ m = k := by
  rw [Nat.add_comm n m, Nat.add_comm n k]; exact add_right_cancel_iff
protected theorem add_left_cancel {n m k : Nat} (h : n + m = n + k) : m = k := add_left_cancel_iff.mp h
protected theorem add_right_cancel {n m k : Nat} (h : n + m = k + m) : n = k := add_right_cancel_iff.mp h
@[simp] theorem add_eq_zero_iff {n m : Nat} : n + m = 0 ↔ n = 0 ∧ m = 0 := by
  cases m with
  | zero => exact ⟨fun h => ⟨h, rfl⟩, fun h => h.1⟩
  | succ m => exact ⟨fun h => (nomatch h), fun h => (nomatch h.2)⟩
@[simp] theorem add_eq_left {n m : Nat} : n + m = n ↔ m = 0 := add_left_cancel_iff (k := 0)
@[simp] theorem add_eq_right {n m : Nat} : n + m = m ↔ n = 0 := by
  rw [Nat.add_comm]; exact add_eq_left
@[simp] theorem left_eq_add {n m : Nat} : n = n + m ↔ m = 0 := Iff.trans eq_comm add_eq_left
@[simp] theorem right_eq_add {n m : Nat} : m = n + m ↔ n = 0 := Iff.trans eq_comm add_eq_right
@[simp] theorem succ_ne_zero (n : Nat) : Nat.succ n ≠ 0 := fun h => nomatch h
@[simp] theorem add_one_ne_zero (n : Nat) : n + 1 ≠ 0 := fun h => nomatch h
@[simp] theorem zero_ne_add_one (n : Nat) : 0 ≠ n + 1 := fun h => nomatch h
theorem succ_ne_self (n : Nat) : Nat.succ n ≠ n := by
  induction n with
  | zero => exact fun h => nomatch h
  | succ n ih => exact fun h => ih (succ.inj' h)
@[simp] theorem add_one_ne_self (n : Nat) : n + 1 ≠ n := succ_ne_self n
@[simp] theorem self_ne_add_one (n : Nat) : n ≠ n + 1 := (succ_ne_self n).symm
theorem exists_eq_succ_of_ne_zero {n : Nat} (h : n ≠ 0) : ∃ k, n = Nat.succ k := by
  cases n with
  | zero => exact absurd rfl h
  | succ n => exact ⟨n, rfl⟩
@[simp] protected theorem mul_zero (n : Nat) : n * 0 = 0 := rfl
theorem mul_succ (n m : Nat) : n * Nat.succ m = n * m + n := rfl
theorem mul_add_one (n m : Nat) : n * (m + 1) = n * m + n := rfl
@[simp] protected theorem zero_mul (n : Nat) : 0 * n = 0 := by
  induction n with
  | zero => rfl
  | succ n ih => exact ih
theorem succ_mul (n m : Nat) : Nat.succ n * m = n * m + m := by
  induction m with
  | zero => rfl
  | succ m ih => rw [mul_succ, ih, mul_succ, add_succ, add_succ, Nat.add_right_comm]
theorem add_one_mul (n m : Nat) : (n + 1) * m = n * m + m := succ_mul n m
protected theorem mul_comm (n m : Nat) : n * m = m * n := by
  induction m with
  | zero => exact (Nat.zero_mul n).symm
  | succ m ih => rw [mul_add_one, add_one_mul, ih]
@[simp] protected theorem mul_one (n : Nat) : n * 1 = n := Nat.zero_add n
@[simp] protected theorem one_mul (n : Nat) : 1 * n = n := by rw [Nat.mul_comm, Nat.mul_one]
protected theorem left_distrib (n m k : Nat) : n * (m + k) = n * m + n * k := by
  induction k with
  | zero => rfl
  | succ k ih => rw [← Nat.add_assoc, mul_add_one, ih, mul_add_one, Nat.add_assoc]
protected theorem mul_add (n m k : Nat) : n * (m + k) = n * m + n * k := Nat.left_distrib n m k
protected theorem right_distrib (n m k : Nat) : (n + m) * k = n * k + m * k := by
  rw [Nat.mul_comm, Nat.left_distrib, Nat.mul_comm k n, Nat.mul_comm k m]
protected theorem add_mul (n m k : Nat) : (n + m) * k = n * k + m * k := Nat.right_distrib n m k
protected theorem mul_assoc (n m k : Nat) : n * m * k = n * (m * k) := by
  induction k with
  | zero => rfl
  | succ k ih => rw [mul_add_one, ih, mul_add_one, Nat.left_distrib]
protected theorem mul_left_comm (n m k : Nat) : n * (m * k) = m * (n * k) := by
  rw [← Nat.mul_assoc, Nat.mul_comm n m, Nat.mul_assoc]
protected theorem mul_right_comm (n m k : Nat) : n * m * k = n * k * m := by
  rw [Nat.mul_assoc, Nat.mul_comm m k, ← Nat.mul_assoc]
protected theorem two_mul (n : Nat) : 2 * n = n + n := by rw [Nat.mul_comm]; exact congrArg (· + n) (Nat.zero_add n)
protected theorem mul_two (n : Nat) : n * 2 = n + n := by rw [Nat.mul_comm, Nat.two_mul]
@[simp] protected theorem mul_eq_zero {n m : Nat} : n * m = 0 ↔ n = 0 ∨ m = 0 := by
  cases m with
  | zero => exact ⟨fun _ => .inr rfl, fun _ => rfl⟩
  | succ m =>
    cases n with
    | zero => exact ⟨fun _ => .inl rfl, fun _ => Nat.zero_mul _⟩
    | succ n => exact ⟨fun h => (nomatch h), fun h => h.elim (fun h => nomatch h) (fun h => nomatch h)⟩

/-! ### Order -/
@[simp] protected theorem le_refl (n : Nat) : n ≤ n := Nat.le.refl
protected theorem le_rfl {n : Nat} : n ≤ n := Nat.le.refl
protected theorem le_of_eq {n m : Nat} (h : n = m) : n ≤ m := h ▸ Nat.le.refl
protected theorem lt_of_le_of_lt {n m k : Nat} (h₁ : n ≤ m) (h₂ : m < k) : n < k := Nat.le_trans (Nat.succ_le_succ h₁) h₂
protected theorem lt_of_lt_of_le {n m k : Nat} (h₁ : n < m) (h₂ : m ≤ k) : n < k := Nat.le_trans h₁ h₂
theorem le_of_succ_le {n m : Nat} (h : Nat.succ n ≤ m) : n ≤ m := Nat.le_trans (Nat.le_succ n) h
protected theorem le_of_lt {n m : Nat} (h : n < m) : n ≤ m := le_of_succ_le h
protected theorem lt_trans {n m k : Nat} (h₁ : n < m) (h₂ : m < k) : n < k := Nat.lt_of_lt_of_le h₁ (Nat.le_of_lt h₂)
theorem lt_succ_self (n : Nat) : n < Nat.succ n := Nat.le.refl
@[simp] theorem lt_add_one (n : Nat) : n < n + 1 := Nat.le.refl
theorem lt_succ_of_le {n m : Nat} (h : n ≤ m) : n < Nat.succ m := Nat.succ_le_succ h
theorem le_of_lt_succ {n m : Nat} (h : n < Nat.succ m) : n ≤ m := Nat.le_of_succ_le_succ h
theorem le_of_lt_add_one {n m : Nat} (h : n < m + 1) : n ≤ m := Nat.le_of_succ_le_succ h
theorem lt_add_one_of_le {n m : Nat} (h : n ≤ m) : n < m + 1 := Nat.succ_le_succ h
theorem lt_succ_iff {n m : Nat} : n < Nat.succ m ↔ n ≤ m := ⟨le_of_lt_succ, lt_succ_of_le⟩
theorem lt_add_one_iff {n m : Nat} : n < m + 1 ↔ n ≤ m := lt_succ_iff
theorem succ_le_iff {n m : Nat} : Nat.succ n ≤ m ↔ n < m := Iff.rfl
theorem add_one_le_iff {n m : Nat} : n + 1 ≤ m ↔ n < m := Iff.rfl
theorem succ_le_of_lt {n m : Nat} (h : n < m) : Nat.succ n ≤ m := h
@[simp] theorem not_lt_zero (n : Nat) : ¬n < 0 := fun h => Nat.not_succ_le_zero n h
attribute [simp] Nat.zero_le
@[simp] theorem not_add_one_le_zero (n : Nat) : ¬n + 1 ≤ 0 := not_lt_zero n
protected theorem lt_irrefl (n : Nat) : ¬n < n := by
  induction n with
  | zero => exact not_lt_zero 0
  | succ n ih => exact fun h => ih (Nat.le_of_succ_le_succ h)
@[simp] theorem lt_self_iff_false (n : Nat) : (n < n) = False := eq_false (Nat.lt_irrefl n)
protected theorem le_antisymm {n m : Nat} (h₁ : n ≤ m) (h₂ : m ≤ n) : n = m := by
  cases h₁ with
  | refl => rfl
  | step h => exact absurd (Nat.lt_of_le_of_lt h h₂) (Nat.lt_irrefl n)
protected theorem le_antisymm_iff {n m : Nat} : n = m ↔ n ≤ m ∧ m ≤ n := ⟨fun h => ⟨Nat.le_of_eq h, Nat.le_of_eq h.symm⟩, fun h => Nat.le_antisymm h.1 h.2⟩
protected theorem lt_or_ge (n m : Nat) : n < m ∨ n ≥ m := by
  induction m with
  | zero => exact .inr (Nat.zero_le n)
  | succ m ih =>
    cases ih with
    | inl h => exact .inl (Nat.le.step h)
    | inr h =>
      cases h with
      | refl => exact .inl Nat.le.refl
      | step h => exact .inr (Nat.succ_le_succ h)
protected theorem le_total (n m : Nat) : n ≤ m ∨ m ≤ n := (Nat.lt_or_ge n m).elim (fun h => .inl (Nat.le_of_lt h)) .inr
protected theorem not_le_of_gt {n m : Nat} (h : n > m) : ¬n ≤ m := fun h' => Nat.lt_irrefl n (Nat.lt_of_le_of_lt h' h)
protected theorem not_lt_of_ge {n m : Nat} (h : n ≥ m) : ¬n < m := fun h' => Nat.lt_irrefl n (Nat.lt_of_lt_of_le h' h)
protected theorem lt_of_not_ge {n m : Nat} (h : ¬n ≥ m) : n < m := (Nat.lt_or_ge n m).elim id fun h' => absurd h' h
protected theorem lt_of_not_le {n m : Nat} (h : ¬n ≤ m) : m < n := (Nat.lt_or_ge m n).elim id fun h' => absurd h' h
protected theorem le_of_not_gt {n m : Nat} (h : ¬n > m) : n ≤ m := (Nat.lt_or_ge m n).elim (fun h' => absurd h' h) id
protected theorem le_of_not_lt {n m : Nat} (h : ¬n < m) : m ≤ n := (Nat.lt_or_ge n m).elim (fun h' => absurd h' h) id
@[simp] protected theorem not_le {n m : Nat} : ¬n ≤ m ↔ m < n := ⟨Nat.lt_of_not_le, Nat.not_le_of_gt⟩
@[simp] protected theorem not_lt {n m : Nat} : ¬n < m ↔ m ≤ n := ⟨Nat.le_of_not_lt, Nat.not_lt_of_ge⟩
protected theorem ne_of_lt {n m : Nat} (h : n < m) : n ≠ m := fun e => Nat.lt_irrefl n (e ▸ h)
protected theorem ne_of_gt {n m : Nat} (h : m < n) : n ≠ m := fun e => Nat.lt_irrefl n (e ▸ h)
protected theorem lt_of_le_of_ne {n m : Nat} (h₁ : n ≤ m) (h₂ : n ≠ m) : n < m := (Nat.lt_or_ge n m).elim id fun h => absurd (Nat.le_antisymm h₁ h) h₂
theorem lt_or_eq_of_le {n m : Nat} (h : n ≤ m) : n < m ∨ n = m := (Nat.lt_or_ge n m).elim .inl fun h' => .inr (Nat.le_antisymm h h')
protected theorem le_iff_lt_or_eq {n m : Nat} : n ≤ m ↔ n < m ∨ n = m := ⟨lt_or_eq_of_le, fun h => h.elim Nat.le_of_lt Nat.le_of_eq⟩
protected theorem lt_trichotomy (n m : Nat) : n < m ∨ n = m ∨ m < n :=
  (Nat.lt_or_ge n m).elim .inl fun h => .inr ((lt_or_eq_of_le h).elim .inr fun e => .inl e.symm)
protected theorem lt_asymm {n m : Nat} (h : n < m) : ¬m < n := Nat.not_lt_of_ge (Nat.le_of_lt h)
@[simp] theorem le_zero_eq (n : Nat) : (n ≤ 0) = (n = 0) := propext ⟨fun h => Nat.le_antisymm h (Nat.zero_le n), Nat.le_of_eq⟩
theorem le_zero {n : Nat} : n ≤ 0 ↔ n = 0 := Iff.of_eq (le_zero_eq n)
theorem eq_zero_of_le_zero {n : Nat} (h : n ≤ 0) : n = 0 := le_zero.mp h
@[simp] theorem lt_one_iff {n : Nat} : n < 1 ↔ n = 0 := lt_succ_iff.trans le_zero
protected theorem pos_of_ne_zero {n : Nat} (h : n ≠ 0) : 0 < n := by
  cases n with
  | zero => exact absurd rfl h
  | succ n => exact Nat.succ_le_succ (Nat.zero_le n)
protected theorem ne_zero_of_lt {n m : Nat} (h : n < m) : m ≠ 0 := fun e => not_lt_zero n (e ▸ h)
protected theorem pos_iff_ne_zero {n : Nat} : 0 < n ↔ n ≠ 0 := ⟨Nat.ne_zero_of_lt, Nat.pos_of_ne_zero⟩
protected theorem eq_zero_or_pos (n : Nat) : n = 0 ∨ 0 < n := by
  cases n with
  | zero => exact .inl rfl
  | succ n => exact .inr (Nat.succ_le_succ (Nat.zero_le n))
@[simp] theorem zero_lt_succ (n : Nat) : 0 < Nat.succ n := Nat.succ_le_succ (Nat.zero_le n)
@[simp] theorem zero_lt_add_one (n : Nat) : 0 < n + 1 := zero_lt_succ n
@[simp] theorem one_le_add_one (n : Nat) : 1 ≤ n + 1 := zero_lt_succ n
theorem succ_pos (n : Nat) : 0 < Nat.succ n := zero_lt_succ n
theorem succ_le_succ_iff {n m : Nat} : Nat.succ n ≤ Nat.succ m ↔ n ≤ m := ⟨Nat.le_of_succ_le_succ, Nat.succ_le_succ⟩
theorem succ_lt_succ {n m : Nat} (h : n < m) : Nat.succ n < Nat.succ m := Nat.succ_le_succ h
theorem lt_of_succ_lt_succ {n m : Nat} (h : Nat.succ n < Nat.succ m) : n < m := Nat.le_of_succ_le_succ h
@[simp] theorem le_add_right (n k : Nat) : n ≤ n + k := by
  induction k with
  | zero => exact Nat.le.refl
  | succ k ih => exact Nat.le.step ih
@[simp] theorem le_add_left (n k : Nat) : n ≤ k + n := Nat.add_comm n k ▸ le_add_right n k
theorem le_succ_of_le {n m : Nat} (h : n ≤ m) : n ≤ Nat.succ m := Nat.le.step h
theorem le_add_one_of_le {n m : Nat} (h : n ≤ m) : n ≤ m + 1 := Nat.le.step h
theorem le_add_right_of_le {n m k : Nat} (h : n ≤ m) : n ≤ m + k := Nat.le_trans h (le_add_right m k)
theorem le_add_left_of_le {n m k : Nat} (h : n ≤ m) : n ≤ k + m := Nat.le_trans h (le_add_left m k)
theorem le.dest {n m : Nat} (h : n ≤ m) : ∃ k, n + k = m := by
  induction h with
  | refl => exact ⟨0, rfl⟩
  | step _ ih => exact ih.elim fun k e => ⟨k + 1, congrArg Nat.succ e⟩
theorem le.intro {n m k : Nat} (h : n + k = m) : n ≤ m := h ▸ le_add_right n k
theorem exists_eq_add_of_le {n m : Nat} (h : n ≤ m) : ∃ k, m = n + k := (le.dest h).elim fun k e => ⟨k, e.symm⟩
theorem le_iff_exists_add {n m : Nat} : n ≤ m ↔ ∃ k, m = n + k := ⟨exists_eq_add_of_le, fun ⟨_, e⟩ => e ▸ le_add_right n _⟩
@[simp] protected theorem add_le_add_iff_right {n m k : Nat} : n + k ≤ m + k ↔ n ≤ m := by
  induction k with
  | zero => exact Iff.rfl
  | succ k ih => exact succ_le_succ_iff.trans ih
@[simp] protected theorem add_le_add_iff_left {n m k : Nat} : k + n ≤ k + m ↔ n ≤ m := by
  rw [Nat.add_comm k n, Nat.add_comm k m]; exact Nat.add_le_add_iff_right
@[simp] protected theorem add_lt_add_iff_right {n m k : Nat} : n + k < m + k ↔ n < m := by
  show Nat.succ (n + k) ≤ m + k ↔ Nat.succ n ≤ m
  rw [← succ_add]; exact Nat.add_le_add_iff_right
@[simp] protected theorem add_lt_add_iff_left {n m k : Nat} : k + n < k + m ↔ n < m := by
  rw [Nat.add_comm k n, Nat.add_comm k m]; exact Nat.add_lt_add_iff_right
protected theorem add_le_add_left {n m : Nat} (h : n ≤ m) (k : Nat) : k + n ≤ k + m := Nat.add_le_add_iff_left.mpr h
protected theorem add_le_add_right {n m : Nat} (h : n ≤ m) (k : Nat) : n + k ≤ m + k := Nat.add_le_add_iff_right.mpr h
protected theorem add_le_add {a b c d : Nat} (h₁ : a ≤ b) (h₂ : c ≤ d) : a + c ≤ b + d := Nat.le_trans (Nat.add_le_add_right h₁ c) (Nat.add_le_add_left h₂ b)
protected theorem add_lt_add_left {n m : Nat} (h : n < m) (k : Nat) : k + n < k + m := Nat.add_lt_add_iff_left.mpr h
protected theorem add_lt_add_right {n m : Nat} (h : n < m) (k : Nat) : n + k < m + k := Nat.add_lt_add_iff_right.mpr h
protected theorem add_lt_add {a b c d : Nat} (h₁ : a < b) (h₂ : c < d) : a + c < b + d := Nat.lt_trans (Nat.add_lt_add_right h₁ c) (Nat.add_lt_add_left h₂ b)
protected theorem add_lt_add_of_le_of_lt {a b c d : Nat} (h₁ : a ≤ b) (h₂ : c < d) : a + c < b + d := Nat.lt_of_le_of_lt (Nat.add_le_add_right h₁ c) (Nat.add_lt_add_left h₂ b)
protected theorem add_lt_add_of_lt_of_le {a b c d : Nat} (h₁ : a < b) (h₂ : c ≤ d) : a + c < b + d := Nat.lt_of_lt_of_le (Nat.add_lt_add_right h₁ c) (Nat.add_le_add_left h₂ b)
protected theorem lt_add_of_pos_right {n k : Nat} (h : 0 < k) : n < n + k := Nat.add_lt_add_left h n
protected theorem lt_add_of_pos_left {n k : Nat} (h : 0 < k) : n < k + n := Nat.add_comm n k ▸ Nat.lt_add_of_pos_right h
protected theorem le_of_add_le_add_left {n m k : Nat} (h : k + n ≤ k + m) : n ≤ m := Nat.add_le_add_iff_left.mp h
protected theorem le_of_add_le_add_right {n m k : Nat} (h : n + k ≤ m + k) : n ≤ m := Nat.add_le_add_iff_right.mp h
protected theorem add_pos_left {n : Nat} (h : 0 < n) (m : Nat) : 0 < n + m := Nat.lt_of_lt_of_le h (le_add_right n m)
protected theorem add_pos_right {m : Nat} (n : Nat) (h : 0 < m) : 0 < n + m := Nat.lt_of_lt_of_le h (le_add_left m n)
protected theorem mul_le_mul_left {n m : Nat} (k : Nat) (h : n ≤ m) : k * n ≤ k * m :=
  (le.dest h).elim fun d e => e ▸ Nat.left_distrib k n d ▸ le_add_right _ _
protected theorem mul_le_mul_right {n m : Nat} (k : Nat) (h : n ≤ m) : n * k ≤ m * k := by
  rw [Nat.mul_comm n k, Nat.mul_comm m k]; exact Nat.mul_le_mul_left k h
protected theorem mul_le_mul {a b c d : Nat} (h₁ : a ≤ b) (h₂ : c ≤ d) : a * c ≤ b * d := Nat.le_trans (Nat.mul_le_mul_right c h₁) (Nat.mul_le_mul_left b h₂)
protected theorem mul_pos {n m : Nat} (hn : 0 < n) (hm : 0 < m) : 0 < n * m := Nat.mul_le_mul (Nat.succ_le_of_lt hn) (Nat.succ_le_of_lt hm)
protected theorem mul_lt_mul_of_pos_left {n m k : Nat} (h : n < m) (hk : 0 < k) : k * n < k * m :=
  Nat.lt_of_lt_of_le (Nat.lt_add_of_pos_right hk) (Nat.mul_le_mul_left k h)
protected theorem mul_lt_mul_of_pos_right {n m k : Nat} (h : n < m) (hk : 0 < k) : n * k < m * k := by
  rw [Nat.mul_comm n k, Nat.mul_comm m k]; exact Nat.mul_lt_mul_of_pos_left h hk
protected theorem eq_of_mul_eq_mul_left {n m k : Nat} (hk : 0 < k) (h : k * n = k * m) : n = m :=
  (Nat.lt_trichotomy n m).elim (fun l => absurd h (Nat.ne_of_lt (Nat.mul_lt_mul_of_pos_left l hk)))
    fun o => o.elim id fun l => absurd h (Nat.ne_of_gt (Nat.mul_lt_mul_of_pos_left l hk))
protected theorem eq_of_mul_eq_mul_right {n m k : Nat} (hk : 0 < k) (h : n * k = m * k) : n = m := by
  rw [Nat.mul_comm n k, Nat.mul_comm m k] at h; exact Nat.eq_of_mul_eq_mul_left hk h
theorem le_mul_of_pos_right {n m : Nat} (h : 0 < m) : n ≤ n * m := by
  have := Nat.mul_le_mul_left n h; rwa [Nat.mul_one] at this
theorem le_mul_of_pos_left {n m : Nat} (h : 0 < m) : n ≤ m * n := Nat.mul_comm n m ▸ le_mul_of_pos_right h
instance : @Trans Nat Nat Nat LE.le LE.le LE.le := ⟨Nat.le_trans⟩
instance : @Trans Nat Nat Nat LT.lt LT.lt LT.lt := ⟨Nat.lt_trans⟩
instance : @Trans Nat Nat Nat LE.le LT.lt LT.lt := ⟨Nat.lt_of_le_of_lt⟩
instance : @Trans Nat Nat Nat LT.lt LE.le LT.lt := ⟨Nat.lt_of_lt_of_le⟩
instance : @Trans Nat Nat Nat GE.ge GE.ge GE.ge := ⟨fun h h' => Nat.le_trans h' h⟩
instance : @Trans Nat Nat Nat GT.gt GT.gt GT.gt := ⟨fun h h' => Nat.lt_trans h' h⟩

/-! ### Induction -/
@[elab_as_elim] protected theorem strongRecOn {motive : Nat → Prop} (n : Nat) (ind : ∀ n, (∀ m, m < n → motive m) → motive n) : motive n :=
  have all : ∀ k m, m < k → motive m := fun k => by
    induction k with
    | zero => exact fun m h => absurd h (not_lt_zero m)
    | succ k ih => exact fun m h => ind m fun j hj => ih j (Nat.lt_of_lt_of_le hj (le_of_lt_succ h))
  all (n + 1) n (lt_add_one n)
@[elab_as_elim] theorem le_induction {m : Nat} {P : (n : Nat) → m ≤ n → Prop} (base : P m (Nat.le_refl m))
    (step : ∀ n (h : m ≤ n), P n h → P (n + 1) (Nat.le_succ_of_le h)) (n : Nat) (h : m ≤ n) : P n h := by
  induction h with
  | refl => exact base
  | step h ih => exact step _ h ih

/-! ### Subtraction and predecessor -/
@[simp] protected theorem sub_zero (n : Nat) : n - 0 = n := rfl
theorem sub_succ (n m : Nat) : n - Nat.succ m = Nat.pred (n - m) := rfl
@[simp] theorem pred_zero : Nat.pred 0 = 0 := rfl
@[simp] theorem pred_succ (n : Nat) : Nat.pred (Nat.succ n) = n := rfl
theorem pred_eq_sub_one (n : Nat) : Nat.pred n = n - 1 := rfl
@[simp] theorem add_one_sub_one (n : Nat) : n + 1 - 1 = n := rfl
@[simp] theorem succ_sub_succ (n m : Nat) : Nat.succ n - Nat.succ m = n - m := by
  induction m with
  | zero => rfl
  | succ m ih => exact congrArg Nat.pred ih
@[simp] theorem add_one_sub_add_one (n m : Nat) : n + 1 - (m + 1) = n - m := succ_sub_succ n m
@[simp] protected theorem sub_self (n : Nat) : n - n = 0 := by
  induction n with
  | zero => rfl
  | succ n ih => rw [add_one_sub_add_one, ih]
@[simp] protected theorem zero_sub (n : Nat) : 0 - n = 0 := by
  induction n with
  | zero => rfl
  | succ n ih => rw [show 0 - (n + 1) = Nat.pred (0 - n) from rfl, ih]; rfl
@[simp] protected theorem add_sub_cancel (n m : Nat) : n + m - m = n := by
  induction m with
  | zero => rfl
  | succ m ih => rw [← Nat.add_assoc, add_one_sub_add_one, ih]
@[simp] protected theorem add_sub_cancel_left (n m : Nat) : n + m - n = m := by rw [Nat.add_comm, Nat.add_sub_cancel]
protected theorem sub_sub (n m k : Nat) : n - m - k = n - (m + k) := by
  induction k with
  | zero => rfl
  | succ k ih => exact congrArg Nat.pred ih
protected theorem sub_add_cancel {n m : Nat} (h : m ≤ n) : n - m + m = n :=
  (le.dest h).elim fun k e => by rw [← e, Nat.add_sub_cancel_left, Nat.add_comm]
protected theorem add_sub_of_le {n m : Nat} (h : n ≤ m) : n + (m - n) = m := by rw [Nat.add_comm, Nat.sub_add_cancel h]
theorem sub_le (n m : Nat) : n - m ≤ n := by
  induction m with
  | zero => exact Nat.le.refl
  | succ m ih => exact Nat.le_trans (Nat.pred_le (n - m)) ih
theorem sub_eq_zero_of_le {n m : Nat} (h : n ≤ m) : n - m = 0 := (le.dest h).elim fun k e => by rw [← e, ← Nat.sub_sub, Nat.sub_self, Nat.zero_sub]
theorem le_of_sub_eq_zero {n m : Nat} (h : n - m = 0) : n ≤ m :=
  (Nat.le_total n m).elim id fun l => Nat.le_of_eq (by have e := Nat.sub_add_cancel l; rw [h, Nat.zero_add] at e; exact e.symm)
@[simp] theorem sub_eq_zero_iff_le {n m : Nat} : n - m = 0 ↔ n ≤ m := ⟨le_of_sub_eq_zero, sub_eq_zero_of_le⟩
theorem sub_lt {n m : Nat} (hn : 0 < n) (hm : 0 < m) : n - m < n := by
  cases n with
  | zero => exact absurd hn (Nat.lt_irrefl 0)
  | succ n =>
    cases m with
    | zero => exact absurd hm (Nat.lt_irrefl 0)
    | succ m => rw [add_one_sub_add_one]; exact lt_succ_of_le (sub_le n m)
theorem sub_pos_of_lt {n m : Nat} (h : m < n) : 0 < n - m := Nat.pos_of_ne_zero fun e => absurd (le_of_sub_eq_zero e) (Nat.not_le_of_gt h)
protected theorem eq_sub_of_add_eq {a b c : Nat} (h : a + b = c) : a = c - b := by rw [← h, Nat.add_sub_cancel]
protected theorem sub_eq_of_eq_add {a b c : Nat} (h : a = c + b) : a - b = c := by rw [h, Nat.add_sub_cancel]
protected theorem sub_le_sub_right {n m : Nat} (h : n ≤ m) (k : Nat) : n - k ≤ m - k := by
  induction k with
  | zero => exact h
  | succ k ih => exact Nat.pred_le_pred ih
protected theorem add_sub_assoc {m k : Nat} (h : k ≤ m) (n : Nat) : n + m - k = n + (m - k) :=
  Nat.sub_eq_of_eq_add (by rw [Nat.add_assoc, Nat.sub_add_cancel h])
protected theorem sub_le_iff_le_add {a b c : Nat} : a - b ≤ c ↔ a ≤ c + b :=
  ⟨fun h => (Nat.le_total b a).elim (fun l => Nat.sub_add_cancel l ▸ Nat.add_le_add_right h b) fun l => Nat.le_trans l (le_add_left b c),
   fun h => Nat.add_sub_cancel c b ▸ Nat.sub_le_sub_right h b⟩
protected theorem le_sub_iff_add_le {a b c : Nat} (h : c ≤ b) : a ≤ b - c ↔ a + c ≤ b :=
  ⟨fun l => Nat.sub_add_cancel h ▸ Nat.add_le_add_right l c, fun l => Nat.add_sub_cancel a c ▸ Nat.sub_le_sub_right l c⟩

/-! ### Powers -/
@[simp] protected theorem pow_zero (n : Nat) : n ^ 0 = 1 := rfl
protected theorem pow_succ (n m : Nat) : n ^ (m + 1) = n ^ m * n := rfl
@[simp] protected theorem pow_one (n : Nat) : n ^ 1 = n := Nat.one_mul n
@[simp] protected theorem one_pow (n : Nat) : 1 ^ n = 1 := by
  induction n with
  | zero => rfl
  | succ n ih => rw [Nat.pow_succ, ih]
protected theorem pow_two (n : Nat) : n ^ 2 = n * n := by rw [Nat.pow_succ, Nat.pow_one]
protected theorem zero_pow {n : Nat} (h : 0 < n) : 0 ^ n = 0 := by
  cases n with
  | zero => exact absurd h (Nat.lt_irrefl 0)
  | succ n => exact Nat.mul_zero (0 ^ n)
protected theorem pow_add (a m n : Nat) : a ^ (m + n) = a ^ m * a ^ n := by
  induction n with
  | zero => rw [Nat.add_zero, Nat.pow_zero, Nat.mul_one]
  | succ n ih => rw [← Nat.add_assoc, Nat.pow_succ, ih, Nat.pow_succ, Nat.mul_assoc]
protected theorem mul_pow (a b n : Nat) : (a * b) ^ n = a ^ n * b ^ n := by
  induction n with
  | zero => rfl
  | succ n ih => rw [Nat.pow_succ, ih, Nat.pow_succ, Nat.pow_succ, Nat.mul_assoc, Nat.mul_assoc, Nat.mul_left_comm (b ^ n) a b]
theorem pow_pos {a : Nat} (h : 0 < a) (n : Nat) : 0 < a ^ n := by
  induction n with
  | zero => exact zero_lt_succ 0
  | succ n ih => exact Nat.mul_pos ih h

/-! ### Minimum and maximum -/
protected theorem min_def {n m : Nat} : min n m = if n ≤ m then n else m := rfl
protected theorem max_def {n m : Nat} : max n m = if n ≤ m then m else n := rfl
theorem min_eq_left {n m : Nat} (h : n ≤ m) : min n m = n := if_pos h
theorem max_eq_right {n m : Nat} (h : n ≤ m) : max n m = m := if_pos h
@[simp] protected theorem min_self (n : Nat) : min n n = n := min_eq_left (Nat.le_refl n)
@[simp] protected theorem max_self (n : Nat) : max n n = n := max_eq_right (Nat.le_refl n)
theorem min_le_left (n m : Nat) : min n m ≤ n := by
  rw [Nat.min_def]; split
  · exact Nat.le_refl n
  · next h => exact Nat.le_of_lt (Nat.lt_of_not_le h)
theorem min_le_right (n m : Nat) : min n m ≤ m := by
  rw [Nat.min_def]; split
  · assumption
  · exact Nat.le_refl m
theorem le_max_left (n m : Nat) : n ≤ max n m := by
  rw [Nat.max_def]; split
  · assumption
  · exact Nat.le_refl n
theorem le_max_right (n m : Nat) : m ≤ max n m := by
  rw [Nat.max_def]; split
  · exact Nat.le_refl m
  · next h => exact Nat.le_of_lt (Nat.lt_of_not_le h)
protected theorem min_comm (n m : Nat) : min n m = min m n :=
  (Nat.le_total n m).elim (fun h => by
    rw [min_eq_left h, Nat.min_def]; split
    · next h' => exact Nat.le_antisymm h h'
    · rfl) fun h => by
    rw [min_eq_left h, Nat.min_def]; split
    · next h' => exact Nat.le_antisymm h' h
    · rfl
/-! ### What the built-in simplification procedures for sums build proofs from -/
namespace Simproc
theorem sub_add_eq_comm (a b c : Nat) : a - (b + c) = a - c - b := by rw [Nat.add_comm b c, Nat.sub_sub]
theorem add_sub_add_le (a c : Nat) {b d : Nat} (h : b ≤ d) : a + b - (c + d) = a - (c + (d - b)) := by
  have e : c + d = b + (c + (d - b)) := by rw [Nat.add_left_comm, Nat.add_sub_of_le h]
  rw [e, ← Nat.sub_sub, Nat.add_sub_cancel]
theorem add_sub_add_ge (a c : Nat) {b d : Nat} (h : b ≥ d) : a + b - (c + d) = a + (b - d) - c := by
  rw [Nat.add_comm c d, ← Nat.sub_sub, Nat.add_sub_assoc h]
theorem add_sub_le (a : Nat) {b c : Nat} (h : b ≤ c) : a + b - c = a - (c - b) := by
  have e := add_sub_add_le a 0 h; rwa [Nat.zero_add, Nat.zero_add] at e
theorem add_eq_gt (a : Nat) {b c : Nat} (h : b > c) : (a + b = c) = False := eq_false fun e => absurd (e ▸ le_add_left b a) (Nat.not_le_of_gt h)
theorem eq_add_gt (a : Nat) {b c : Nat} (h : c > a) : (a = b + c) = False := eq_false fun e => absurd (e ▸ le_add_left c b) (Nat.not_le_of_gt h)
theorem add_eq_le (a : Nat) {b c : Nat} (h : b ≤ c) : (a + b = c) = (a = c - b) :=
  propext ⟨fun e => Nat.eq_sub_of_add_eq e, fun e => by rw [e, Nat.sub_add_cancel h]⟩
theorem eq_add_le {a : Nat} (b : Nat) {c : Nat} (h : c ≤ a) : (a = b + c) = (b = a - c) :=
  propext ⟨fun e => Nat.eq_sub_of_add_eq e.symm, fun e => by rw [e, Nat.sub_add_cancel h]⟩
theorem add_eq_add_le (a c : Nat) {b d : Nat} (h : b ≤ d) : (a + b = c + d) = (a = c + (d - b)) := by
  rw [show c + d = c + (d - b) + b by rw [Nat.add_assoc, Nat.sub_add_cancel h]]
  exact propext add_right_cancel_iff
theorem add_eq_add_ge (a c : Nat) {b d : Nat} (h : b ≥ d) : (a + b = c + d) = (a + (b - d) = c) := by
  rw [show a + b = a + (b - d) + d by rw [Nat.add_assoc, Nat.sub_add_cancel h]]
  exact propext add_right_cancel_iff
theorem add_le_add_le (a c : Nat) {b d : Nat} (h : b ≤ d) : (a + b ≤ c + d) = (a ≤ c + (d - b)) := by
  rw [show c + d = c + (d - b) + b by rw [Nat.add_assoc, Nat.sub_add_cancel h]]
  exact propext Nat.add_le_add_iff_right
theorem add_le_add_ge (a c : Nat) {b d : Nat} (h : b ≥ d) : (a + b ≤ c + d) = (a + (b - d) ≤ c) := by
  rw [show a + b = a + (b - d) + d by rw [Nat.add_assoc, Nat.sub_add_cancel h]]
  exact propext Nat.add_le_add_iff_right
theorem add_le_le (a : Nat) {b c : Nat} (h : b ≤ c) : (a + b ≤ c) = (a ≤ c - b) := propext (Nat.le_sub_iff_add_le h).symm
theorem add_le_gt (a : Nat) {b c : Nat} (h : b > c) : (a + b ≤ c) = False := eq_false fun l => absurd (Nat.le_trans (le_add_left b a) l) (Nat.not_le_of_gt h)
theorem le_add_le (a : Nat) {b c : Nat} (h : a ≤ c) : (a ≤ b + c) = True := eq_true (Nat.le_trans h (le_add_left c b))
theorem le_add_ge (a : Nat) {b c : Nat} (h : a ≥ c) : (a ≤ b + c) = (a - c ≤ b) := propext Nat.sub_le_iff_le_add.symm
end Simproc
theorem beqFalseOfEqFalse {a b : Nat} (h : (a = b) = False) : (a == b) = false := by
  cases e : (a == b) with
  | false => rfl
  | true => exact absurd (Nat.eq_of_beq_eq_true e) (of_eq_false h)
end Nat
