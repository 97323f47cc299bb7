/-
Division, remainder and divisibility of natural numbers. The kernel computes `/` and `%` on literals by itself, so what is
defined here must be the very same function: `n / 0 = 0` and `n % 0 = n`.
-/
prelude
import Init.Nat

set_option linter.unusedVariables false

namespace Nat
/-- Division by repeated subtraction, at most `fuel` times. -/
def divFuel : Nat → Nat → Nat → Nat
  | .zero, _, _ => 0
  | .succ fuel, n, m => if 0 < m ∧ m ≤ n then divFuel fuel (n - m) m + 1 else 0
def modFuel : Nat → Nat → Nat → Nat
  | .zero, n, _ => n
  | .succ fuel, n, m => if 0 < m ∧ m ≤ n then modFuel fuel (n - m) m else n
@[extern "lean_nat_div"] protected def div (n m : @& Nat) : Nat := divFuel n n m
@[extern "lean_nat_mod"] protected def mod (n m : @& Nat) : Nat := modFuel n n m
instance instDivNat : Div Nat := ⟨Nat.div⟩
instance instModNat : Mod Nat := ⟨Nat.mod⟩
instance instDvd : Dvd Nat := ⟨fun a b => ∃ c, b = a * c⟩

theorem divFuel_enough (f g n m : Nat) (hf : n ≤ f) (hg : n ≤ g) : divFuel f n m = divFuel g n m := by
  induction f generalizing g n with
  | zero =>
    cases eq_zero_of_le_zero hf
    cases g with
    | zero => rfl
    | succ g => exact (if_neg fun h => absurd (Nat.lt_of_lt_of_le h.1 h.2) (Nat.lt_irrefl 0)).symm
  | succ f ih =>
    cases g with
    | zero =>
      cases eq_zero_of_le_zero hg
      exact if_neg fun h => absurd (Nat.lt_of_lt_of_le h.1 h.2) (Nat.lt_irrefl 0)
    | succ g =>
      show (if 0 < m ∧ m ≤ n then divFuel f (n - m) m + 1 else 0) = if 0 < m ∧ m ≤ n then divFuel g (n - m) m + 1 else 0
      by_cases h : 0 < m ∧ m ≤ n
      · have l : n - m < n := sub_lt (Nat.lt_of_lt_of_le h.1 h.2) h.1
        rw [if_pos h, if_pos h, ih g (n - m) (le_of_lt_succ (Nat.lt_of_lt_of_le l hf)) (le_of_lt_succ (Nat.lt_of_lt_of_le l hg))]
      · rw [if_neg h, if_neg h]
theorem modFuel_enough (f g n m : Nat) (hf : n ≤ f) (hg : n ≤ g) : modFuel f n m = modFuel g n m := by
  induction f generalizing g n with
  | zero =>
    cases eq_zero_of_le_zero hf
    cases g with
    | zero => rfl
    | succ g => exact (if_neg fun h => absurd (Nat.lt_of_lt_of_le h.1 h.2) (Nat.lt_irrefl 0)).symm
  | succ f ih =>
    cases g with
    | zero =>
      cases eq_zero_of_le_zero hg
      exact if_neg fun h => absurd (Nat.lt_of_lt_of_le h.1 h.2) (Nat.lt_irrefl 0)
    | succ g =>
      show (if 0 < m ∧ m ≤ n then modFuel f (n - m) m else n) = if 0 < m ∧ m ≤ n then modFuel g (n - m) m else n
      by_cases h : 0 < m ∧ m ≤ n
      · have l : n - m < n := sub_lt (Nat.lt_of_lt_of_le h.1 h.2) h.1
        rw [if_pos h, if_pos h, ih g (n - m) (le_of_lt_succ (Nat.lt_of_lt_of_le l hf)) (le_of_lt_succ (Nat.lt_of_lt_of_le l hg))]
      · rw [if_neg h, if_neg h]
theorem div_eq (n m : Nat) : n / m = if 0 < m ∧ m ≤ n then (n - m) / m + 1 else 0 := by
  show divFuel n n m = _
  rw [divFuel_enough n (n + 1) n m (Nat.le_refl n) (Nat.le_succ n)]
  show (if 0 < m ∧ m ≤ n then divFuel n (n - m) m + 1 else 0) = if 0 < m ∧ m ≤ n then divFuel (n - m) (n - m) m + 1 else 0
  rw [divFuel_enough n (n - m) (n - m) m (sub_le n m) (Nat.le_refl _)]
theorem mod_eq (n m : Nat) : n % m = if 0 < m ∧ m ≤ n then (n - m) % m else n := by
  show modFuel n n m = _
  rw [modFuel_enough n (n + 1) n m (Nat.le_refl n) (Nat.le_succ n)]
  show (if 0 < m ∧ m ≤ n then modFuel n (n - m) m else n) = if 0 < m ∧ m ≤ n then modFuel (n - m) (n - m) m else n
  rw [modFuel_enough n (n - m) (n - m) m (sub_le n m) (Nat.le_refl _)]
theorem div_eq_of_lt {n m : Nat} (h : n < m) : n / m = 0 := by
  rw [div_eq, if_neg fun h' => Nat.not_le_of_gt h h'.2]
theorem mod_eq_of_lt {n m : Nat} (h : n < m) : n % m = n := by
  rw [mod_eq, if_neg fun h' => Nat.not_le_of_gt h h'.2]
@[simp] protected theorem div_zero (n : Nat) : n / 0 = 0 := by
  rw [div_eq, if_neg fun h => Nat.lt_irrefl 0 h.1]
@[simp] theorem mod_zero (n : Nat) : n % 0 = n := by
  rw [mod_eq, if_neg fun h => Nat.lt_irrefl 0 h.1]
@[simp] protected theorem zero_div (n : Nat) : 0 / n = 0 := by
  rw [div_eq, if_neg fun h => absurd (Nat.lt_of_lt_of_le h.1 h.2) (Nat.lt_irrefl 0)]
@[simp] theorem zero_mod (n : Nat) : 0 % n = 0 := by
  rw [mod_eq, if_neg fun h => absurd (Nat.lt_of_lt_of_le h.1 h.2) (Nat.lt_irrefl 0)]
theorem add_div_right (n : Nat) {m : Nat} (h : 0 < m) : (n + m) / m = n / m + 1 := by
  rw [div_eq, if_pos ⟨h, le_add_left m n⟩, Nat.add_sub_cancel]
@[simp] theorem add_mod_right (n m : Nat) : (n + m) % m = n % m := by
  cases Nat.eq_zero_or_pos m with
  | inl h => rw [h, Nat.add_zero]
  | inr h => rw [mod_eq, if_pos ⟨h, le_add_left m n⟩, Nat.add_sub_cancel]
@[simp] theorem add_mod_left (n m : Nat) : (m + n) % m = n % m := by rw [Nat.add_comm, add_mod_right]
theorem mod_lt (n : Nat) {m : Nat} (h : m > 0) : n % m < m := by
  induction n using Nat.strongRecOn with
  | _ n ih =>
    rw [mod_eq]
    by_cases c : 0 < m ∧ m ≤ n
    · rw [if_pos c]; exact ih _ (sub_lt (Nat.lt_of_lt_of_le c.1 c.2) c.1)
    · rw [if_neg c]; exact Nat.lt_of_not_le fun l => c ⟨h, l⟩
theorem div_add_mod (n m : Nat) : m * (n / m) + n % m = n := by
  induction n using Nat.strongRecOn with
  | _ n ih =>
    by_cases c : 0 < m ∧ m ≤ n
    · rw [div_eq, mod_eq, if_pos c, if_pos c, Nat.mul_add_one, Nat.add_right_comm, ih _ (sub_lt (Nat.lt_of_lt_of_le c.1 c.2) c.1)]
      exact Nat.sub_add_cancel c.2
    · rw [div_eq, mod_eq, if_neg c, if_neg c, Nat.mul_zero, Nat.zero_add]
theorem mod_add_div (n m : Nat) : n % m + m * (n / m) = n := by rw [Nat.add_comm, div_add_mod]
@[simp] theorem mod_self (n : Nat) : n % n = 0 := by have h := add_mod_right 0 n; rwa [Nat.zero_add, zero_mod] at h
theorem div_self {n : Nat} (h : 0 < n) : n / n = 1 := by have e := add_div_right 0 h; rwa [Nat.zero_add, Nat.zero_div] at e
@[simp] theorem mod_one (n : Nat) : n % 1 = 0 := lt_one_iff.mp (mod_lt n (zero_lt_succ 0))
@[simp] protected theorem div_one (n : Nat) : n / 1 = n := by have h := div_add_mod n 1; rwa [mod_one, Nat.one_mul] at h
@[simp] theorem mul_mod_right (n m : Nat) : n * m % n = 0 := by
  induction m with
  | zero => exact zero_mod n
  | succ m ih => rw [Nat.mul_add_one, add_mod_right, ih]
@[simp] theorem mul_mod_left (n m : Nat) : n * m % m = 0 := by rw [Nat.mul_comm, mul_mod_right]
@[simp] theorem mul_div_right (n : Nat) {m : Nat} (h : 0 < m) : m * n / m = n := by
  induction n with
  | zero => exact Nat.zero_div m
  | succ n ih => rw [Nat.mul_add_one, add_div_right _ h, ih]
@[simp] theorem mul_div_left (n : Nat) {m : Nat} (h : 0 < m) : n * m / m = n := by rw [Nat.mul_comm, mul_div_right n h]
@[simp] theorem add_mul_mod_self_left (a b c : Nat) : (a + b * c) % b = a % b := by
  induction c with
  | zero => rfl
  | succ c ih => rw [Nat.mul_add_one, ← Nat.add_assoc, add_mod_right, ih]
@[simp] theorem add_mul_mod_self_right (a b c : Nat) : (a + b * c) % c = a % c := by rw [Nat.mul_comm, add_mul_mod_self_left]
theorem div_le_self (n m : Nat) : n / m ≤ n := by
  cases Nat.eq_zero_or_pos m with
  | inl h => rw [h, Nat.div_zero]; exact Nat.zero_le n
  | inr h => exact Nat.le_trans (le_mul_of_pos_left h) (Nat.le_trans (le_add_right _ (n % m)) (Nat.le_of_eq (div_add_mod n m)))

/-! ### Divisibility -/
theorem dvd_def {a b : Nat} : a ∣ b ↔ ∃ c, b = a * c := Iff.rfl
protected theorem dvd_intro {a b : Nat} (c : Nat) (h : a * c = b) : a ∣ b := ⟨c, h.symm⟩
@[simp] protected theorem dvd_refl (a : Nat) : a ∣ a := ⟨1, (Nat.mul_one a).symm⟩
@[simp] protected theorem dvd_zero (a : Nat) : a ∣ 0 := ⟨0, rfl⟩
@[simp] protected theorem one_dvd (a : Nat) : 1 ∣ a := ⟨a, (Nat.one_mul a).symm⟩
@[simp] protected theorem dvd_mul_right (a b : Nat) : a ∣ a * b := ⟨b, rfl⟩
@[simp] protected theorem dvd_mul_left (a b : Nat) : a ∣ b * a := ⟨b, Nat.mul_comm b a⟩
protected theorem dvd_trans {a b c : Nat} (h₁ : a ∣ b) (h₂ : b ∣ c) : a ∣ c :=
  h₁.elim fun d e => h₂.elim fun f g => ⟨d * f, by rw [g, e, Nat.mul_assoc]⟩
protected theorem dvd_add {a b c : Nat} (h₁ : a ∣ b) (h₂ : a ∣ c) : a ∣ b + c :=
  h₁.elim fun d e => h₂.elim fun f g => ⟨d + f, by rw [e, g, Nat.mul_add]⟩
theorem dvd_mul_right_of_dvd {a b : Nat} (h : a ∣ b) (c : Nat) : a ∣ b * c := Nat.dvd_trans h (Nat.dvd_mul_right b c)
theorem dvd_mul_left_of_dvd {a b : Nat} (h : a ∣ b) (c : Nat) : a ∣ c * b := Nat.dvd_trans h (Nat.dvd_mul_left b c)
theorem mul_dvd_mul {a b c d : Nat} (h₁ : a ∣ b) (h₂ : c ∣ d) : a * c ∣ b * d :=
  h₁.elim fun x e => h₂.elim fun y g => ⟨x * y, by rw [e, g, Nat.mul_assoc, Nat.mul_assoc, Nat.mul_left_comm x c y]⟩
theorem eq_zero_of_zero_dvd {a : Nat} (h : 0 ∣ a) : a = 0 := h.elim fun c e => e.trans (Nat.zero_mul c)
@[simp] protected theorem zero_dvd {a : Nat} : 0 ∣ a ↔ a = 0 := ⟨eq_zero_of_zero_dvd, fun h => h ▸ Nat.dvd_refl 0⟩
theorem le_of_dvd {a b : Nat} (h : 0 < b) (d : a ∣ b) : a ≤ b :=
  d.elim fun c e => by
    cases c with
    | zero => exact absurd e (Nat.ne_of_gt h)
    | succ c => rw [e, Nat.mul_add_one]; exact le_add_left a _
protected theorem dvd_antisymm {a b : Nat} (h₁ : a ∣ b) (h₂ : b ∣ a) : a = b := by
  cases Nat.eq_zero_or_pos a with
  | inl h => rw [h] at h₁ ⊢; exact (eq_zero_of_zero_dvd h₁).symm
  | inr ha =>
    cases Nat.eq_zero_or_pos b with
    | inl h => rw [h] at h₂ ⊢; exact eq_zero_of_zero_dvd h₂
    | inr hb => exact Nat.le_antisymm (le_of_dvd hb h₁) (le_of_dvd ha h₂)
theorem mod_eq_zero_of_dvd {a b : Nat} (h : a ∣ b) : b % a = 0 := h.elim fun c e => e ▸ mul_mod_right a c
theorem dvd_of_mod_eq_zero {a b : Nat} (h : b % a = 0) : a ∣ b := ⟨b / a, by have e := div_add_mod b a; rw [h, Nat.add_zero] at e; exact e.symm⟩
theorem dvd_iff_mod_eq_zero {a b : Nat} : a ∣ b ↔ b % a = 0 := ⟨mod_eq_zero_of_dvd, dvd_of_mod_eq_zero⟩
theorem dvd_eq_true_of_mod_eq_zero {a b : Nat} (h : (b % a == 0) = true) : (a ∣ b) = True := eq_true (dvd_of_mod_eq_zero (Nat.eq_of_beq_eq_true h))
theorem dvd_eq_false_of_mod_ne_zero {a b : Nat} (h : (b % a == 0) = false) : (a ∣ b) = False :=
  eq_false fun d => Nat.ne_of_beq_eq_false h (mod_eq_zero_of_dvd d)
instance decidable_dvd (a b : Nat) : Decidable (a ∣ b) := decidable_of_iff (b % a = 0) dvd_iff_mod_eq_zero.symm
protected theorem dvd_add_right {a b c : Nat} (h : a ∣ b) : a ∣ b + c ↔ a ∣ c :=
  ⟨fun h' => h.elim fun d e => h'.elim fun f g => ⟨f - d, by
      have k : c = a * f - a * d := Nat.eq_sub_of_add_eq (by rw [← e, ← g, Nat.add_comm])
      rw [k]
      cases Nat.le_total d f with
      | inl l => exact (Nat.eq_sub_of_add_eq (by rw [← Nat.mul_add, Nat.sub_add_cancel l])).symm
      | inr l => rw [sub_eq_zero_of_le l, sub_eq_zero_of_le (Nat.mul_le_mul_left a l), Nat.mul_zero]⟩, Nat.dvd_add h⟩
protected theorem mul_div_cancel' {a b : Nat} (h : a ∣ b) : a * (b / a) = b := by
  have e := div_add_mod b a; rwa [mod_eq_zero_of_dvd h, Nat.add_zero] at e
protected theorem div_mul_cancel {a b : Nat} (h : a ∣ b) : b / a * a = b := by rw [Nat.mul_comm, Nat.mul_div_cancel' h]

/-! ### Even and odd -/
theorem mod_two_eq_zero_or_one (n : Nat) : n % 2 = 0 ∨ n % 2 = 1 := by
  have h := mod_lt n (zero_lt_succ 1)
  cases lt_or_eq_of_le (le_of_lt_succ h) with
  | inl h => exact .inl (lt_one_iff.mp h)
  | inr h => exact .inr h
theorem two_dvd_mul_add_one (n : Nat) : 2 ∣ n * (n + 1) := by
  induction n with
  | zero => exact Nat.dvd_zero 2
  | succ n ih =>
    rw [show (n + 1) * (n + 1 + 1) = n * (n + 1) + 2 * (n + 1) by rw [Nat.mul_comm, ← Nat.add_mul]]
    exact Nat.dvd_add ih (Nat.dvd_mul_right 2 _)
end Nat
/-- `n` is twice something. -/
def Even (n : Nat) : Prop := ∃ k, n = k + k
/-- `n` is one more than twice something. -/
def Odd (n : Nat) : Prop := ∃ k, n = 2 * k + 1
namespace Nat
theorem even_iff {n : Nat} : Even n ↔ n % 2 = 0 :=
  ⟨fun ⟨k, e⟩ => by rw [e, ← Nat.two_mul, mul_mod_right], fun h => ⟨n / 2, by rw [← Nat.two_mul, Nat.mul_div_cancel' (dvd_of_mod_eq_zero h)]⟩⟩
theorem odd_iff {n : Nat} : Odd n ↔ n % 2 = 1 :=
  ⟨fun ⟨k, e⟩ => by rw [e, Nat.add_comm, add_mul_mod_self_left]; rfl, fun h => ⟨n / 2, by have e := div_add_mod n 2; rw [h] at e; exact e.symm⟩⟩
instance : DecidablePred Even := fun n => decidable_of_iff (n % 2 = 0) even_iff.symm
instance : DecidablePred Odd := fun n => decidable_of_iff (n % 2 = 1) odd_iff.symm
theorem even_or_odd (n : Nat) : Even n ∨ Odd n := (mod_two_eq_zero_or_one n).elim (fun h => .inl (even_iff.mpr h)) fun h => .inr (odd_iff.mpr h)
theorem not_even_iff_odd {n : Nat} : ¬Even n ↔ Odd n :=
  ⟨fun h => (even_or_odd n).elim (fun e => absurd e h) id, fun o e => by rw [even_iff] at e; rw [odd_iff] at o; rw [e] at o; exact nomatch o⟩
end Nat
theorem Even.add {m n : Nat} : Even m → Even n → Even (m + n) := fun ⟨a, e⟩ ⟨b, f⟩ => ⟨a + b, by rw [e, f, Nat.add_assoc, Nat.add_assoc, Nat.add_left_comm a b b]⟩
theorem Even.mul_right {m : Nat} (h : Even m) (n : Nat) : Even (m * n) := h.elim fun a e => ⟨a * n, by rw [e, Nat.add_mul]⟩
theorem Odd.add_odd {m n : Nat} : Odd m → Odd n → Even (m + n) := fun ⟨a, e⟩ ⟨b, f⟩ =>
  ⟨a + b + 1, by rw [e, f, Nat.two_mul, Nat.two_mul]; simp [Nat.add_assoc, Nat.add_left_comm, Nat.add_comm]⟩
