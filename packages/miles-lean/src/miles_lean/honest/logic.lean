theorem h_id (p : Prop) (h : p) : p := by
  exact h

theorem h_id_term (p : Prop) (h : p) : p :=
  h

theorem h_swap (p q : Prop) (h : p ∧ q) : q ∧ p := by
  constructor
  · exact h.2
  · exact h.1

theorem h_swap_term (p q : Prop) (h : p ∧ q) : q ∧ p :=
  ⟨h.2, h.1⟩

theorem h_swap_obtain (p q : Prop) (h : p ∧ q) : q ∧ p := by
  obtain ⟨hp, hq⟩ := h
  exact ⟨hq, hp⟩

theorem h_or_swap (p q : Prop) (h : p ∨ q) : q ∨ p := by
  cases h with
  | inl h => exact Or.inr h
  | inr h => exact Or.inl h

theorem h_or_swap_rcases (p q : Prop) (h : p ∨ q) : q ∨ p := by
  rcases h with hp | hq
  · right
    assumption
  · left
    assumption

theorem h_or_swap_elim (p q : Prop) (h : p ∨ q) : q ∨ p :=
  h.elim Or.inr Or.inl

theorem h_syllogism (p q r : Prop) (f : p → q) (g : q → r) : p → r := by
  intro hp
  apply g
  apply f
  exact hp

theorem h_syllogism_term (p q r : Prop) (f : p → q) (g : q → r) : p → r :=
  fun h => g (f h)

theorem h_modus_tollens (p q : Prop) (f : p → q) (n : ¬q) : ¬p := by
  intro hp
  exact n (f hp)

theorem h_not_not_intro (p : Prop) (h : p) : ¬¬p := by
  intro n
  contradiction

theorem h_not_not_elim (p : Prop) (h : ¬¬p) : p := by
  by_cases c : p
  · exact c
  · exact absurd c h

theorem h_triple_not (p : Prop) : ¬¬¬p ↔ ¬p := by
  constructor
  · intro h hp
    exact h fun n => n hp
  · intro h n
    exact n h

theorem h_em (p : Prop) : p ∨ ¬p := by
  exact em p

theorem h_em_cases (p : Prop) : p ∨ ¬p := by
  by_cases h : p
  · left
    exact h
  · right
    exact h

theorem h_peirce (p q : Prop) : ((p → q) → p) → p := by
  intro h
  by_cases c : p
  · exact c
  · apply h
    intro hp
    exact absurd hp c

theorem h_contrapositive (p q : Prop) : (p → q) ↔ (¬q → ¬p) := by
  constructor
  · intro f n hp
    exact n (f hp)
  · intro f hp
    apply Classical.byContradiction
    intro n
    exact f n hp

theorem h_de_morgan_or (p q : Prop) : ¬(p ∨ q) ↔ ¬p ∧ ¬q := by
  simp

theorem h_de_morgan_or_long (p q : Prop) : ¬(p ∨ q) ↔ ¬p ∧ ¬q := by
  constructor
  · intro h
    exact ⟨fun hp => h (Or.inl hp), fun hq => h (Or.inr hq)⟩
  · rintro ⟨hp, hq⟩ (h | h)
    · exact hp h
    · exact hq h

theorem h_de_morgan_and (p q : Prop) : ¬(p ∧ q) ↔ ¬p ∨ ¬q := by
  exact not_and_or

theorem h_de_morgan_and_long (p q : Prop) (h : ¬(p ∧ q)) : ¬p ∨ ¬q := by
  by_cases hp : p
  · by_cases hq : q
    · exact absurd ⟨hp, hq⟩ h
    · exact Or.inr hq
  · exact Or.inl hp

theorem h_and_or (p q r : Prop) : p ∧ (q ∨ r) ↔ (p ∧ q) ∨ (p ∧ r) := by
  constructor
  · intro ⟨hp, h⟩
    cases h with
    | inl hq => exact Or.inl ⟨hp, hq⟩
    | inr hr => exact Or.inr ⟨hp, hr⟩
  · intro h
    cases h with
    | inl h => exact ⟨h.1, Or.inl h.2⟩
    | inr h => exact ⟨h.1, Or.inr h.2⟩

theorem h_and_or_lemma (p q r : Prop) : p ∧ (q ∨ r) ↔ (p ∧ q) ∨ (p ∧ r) :=
  and_or_left

theorem h_or_and (p q r : Prop) : p ∨ (q ∧ r) ↔ (p ∨ q) ∧ (p ∨ r) := by
  rw [or_and_left]

theorem h_and_assoc (p q r : Prop) : (p ∧ q) ∧ r ↔ p ∧ (q ∧ r) := by
  constructor
  · rintro ⟨⟨hp, hq⟩, hr⟩
    exact ⟨hp, hq, hr⟩
  · rintro ⟨hp, hq, hr⟩
    exact ⟨⟨hp, hq⟩, hr⟩

theorem h_or_assoc (p q r : Prop) : (p ∨ q) ∨ r ↔ p ∨ (q ∨ r) := by
  constructor
  · rintro ((h | h) | h)
    · exact Or.inl h
    · exact Or.inr (Or.inl h)
    · exact Or.inr (Or.inr h)
  · rintro (h | h | h)
    · exact Or.inl (Or.inl h)
    · exact Or.inl (Or.inr h)
    · exact Or.inr h

theorem h_curry (p q r : Prop) : (p ∧ q → r) ↔ (p → q → r) := by
  constructor
  · intro f hp hq
    exact f ⟨hp, hq⟩
  · intro f h
    exact f h.1 h.2

theorem h_curry_simp (p q r : Prop) : (p ∧ q → r) ↔ (p → q → r) := by
  simp

theorem h_or_imp (p q r : Prop) : (p ∨ q → r) ↔ (p → r) ∧ (q → r) := by
  exact or_imp

theorem h_imp_and (p q r : Prop) (f : p → q) (g : p → r) : p → q ∧ r := by
  intro hp
  refine ⟨?_, ?_⟩
  · exact f hp
  · exact g hp

theorem h_ex_falso (p : Prop) (h : False) : p := by
  exact h.elim

theorem h_ex_falso_cases (p : Prop) (h : False) : p := by
  cases h

theorem h_exfalso (p q : Prop) (h : p) (n : ¬p) : q := by
  exfalso
  exact n h

theorem h_absurd (p q : Prop) (h : p) (n : ¬p) : q :=
  absurd h n

theorem h_no_contradiction (p : Prop) : ¬(p ∧ ¬p) := by
  intro h
  exact h.2 h.1

theorem h_no_contradiction_simp (p : Prop) : ¬(p ∧ ¬p) := by
  simp

theorem h_iff_refl (p : Prop) : p ↔ p := by
  rfl

theorem h_iff_symm (p q : Prop) (h : p ↔ q) : q ↔ p := by
  exact h.symm

theorem h_iff_trans (p q r : Prop) (h₁ : p ↔ q) (h₂ : q ↔ r) : p ↔ r := by
  rw [h₁, h₂]

theorem h_iff_trans_calc (p q r : Prop) (h₁ : p ↔ q) (h₂ : q ↔ r) : p ↔ r :=
  calc p ↔ q := h₁
    _ ↔ r := h₂

theorem h_iff_mp (p q : Prop) (h : p ↔ q) (hp : p) : q := by
  rw [← h]
  exact hp

theorem h_iff_not (p : Prop) : ¬(p ↔ ¬p) := by
  intro h
  have n : ¬p := fun hp => h.mp hp hp
  exact n (h.mpr n)

theorem h_true (p : Prop) : p → True := by
  intro _
  trivial

theorem h_simp_true (p q : Prop) : (p ∧ True) ∨ (q ∧ False) ↔ p := by
  simp

theorem h_resolve (p q : Prop) (h : p ∨ q) (n : ¬p) : q := by
  cases h with
  | inl hp => contradiction
  | inr hq => exact hq

theorem h_resolve_simp (p q : Prop) (h : p ∨ q) (n : ¬p) : q := by
  simpa [n] using h

theorem h_resolve_all (p q : Prop) (h : p ∨ q) (n : ¬p) : q := by
  simp_all

theorem h_imp_swap (p q r : Prop) (f : p → q → r) : q → p → r := by
  intro hq hp
  exact f hp hq

theorem h_s_combinator (p q r : Prop) : (p → q → r) → (p → q) → p → r := by
  intro f g hp
  exact f hp (g hp)

theorem h_k_combinator (p q : Prop) : p → q → p := by
  intros
  assumption

theorem h_imp_or_not (p q : Prop) : (p → q) ↔ ¬p ∨ q := by
  exact Classical.imp_iff_not_or

theorem h_not_imp (p q : Prop) : ¬(p → q) ↔ p ∧ ¬q := by
  simp

theorem h_weak_pierce (p q : Prop) : ¬¬(((p → q) → p) → p) := by
  intro n
  apply n
  intro f
  exact f fun hp => absurd (fun _ => hp) n

theorem h_not_not_em (p : Prop) : ¬¬(p ∨ ¬p) := by
  intro h
  apply h
  right
  intro hp
  exact h (Or.inl hp)

theorem h_either_way (p q : Prop) : (p → q) ∨ (q → p) := by
  by_cases h : q
  · left
    intro _
    exact h
  · right
    intro hq
    exact absurd hq h

theorem h_three_cases (p q r s : Prop) (h : p ∨ q ∨ r) (f : p → s) (g : q → s) (k : r → s) : s := by
  rcases h with h | h | h
  · exact f h
  · exact g h
  · exact k h

theorem h_nested (p q r s : Prop) (h : (p ∧ q) ∧ (r ∧ s)) : s ∧ q := by
  obtain ⟨⟨_, hq⟩, _, hs⟩ := h
  exact ⟨hs, hq⟩

theorem h_all_goals (p q r : Prop) (hp : p) (hq : q) (hr : r) : p ∧ q ∧ r := by
  refine ⟨?_, ?_, ?_⟩ <;> assumption

theorem h_first (p q : Prop) (hq : q) : p ∨ q := by
  first
    | exact Or.inl hq
    | exact Or.inr hq

theorem h_have_chain (p q r s : Prop) (f : p → q) (g : q → r) (k : r → s) (hp : p) : s := by
  have hq : q := f hp
  have hr : r := g hq
  exact k hr

theorem h_suffices (p q : Prop) (f : p → q) (hp : p) : q := by
  suffices h : p from f h
  exact hp

theorem h_show (p q : Prop) (hp : p) (hq : q) : p ∧ q := by
  constructor
  · show p
    exact hp
  · show q
    exact hq

theorem h_prop_ext (p q : Prop) (f : p → q) (g : q → p) : p = q := by
  exact propext ⟨f, g⟩

theorem h_and_congr (p q r s : Prop) (h : p ↔ r) (k : q ↔ s) : (p ∧ q) ↔ (r ∧ s) := by
  rw [h, k]

theorem h_decide_prop : (True ∧ ¬False) ∨ False := by
  decide

theorem h_and_self (p : Prop) : p ∧ p ↔ p := by
  simp

theorem h_or_self (p : Prop) : p ∨ p ↔ p := by
  constructor
  · intro h
    exact h.elim id id
  · exact Or.inl

theorem h_by_contra (p q : Prop) (f : ¬q → ¬p) (hp : p) : q := by
  apply by_contra
  intro n
  exact f n hp
