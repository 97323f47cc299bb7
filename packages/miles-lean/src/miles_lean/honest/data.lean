theorem b_not_not (b : Bool) : (!!b) = b := by
  cases b <;> rfl

theorem b_and_comm (a b : Bool) : (a && b) = (b && a) := by
  cases a <;> cases b <;> rfl

theorem b_or_true (b : Bool) : (b || true) = true := by
  simp

theorem b_de_morgan (a b : Bool) : (!(a && b)) = (!a || !b) := by
  cases a <;> simp

theorem b_distrib (a b c : Bool) : (a && (b || c)) = (a && b || a && c) := by
  cases a
  · rfl
  · rfl

theorem b_eq_true (a b : Bool) (h : (a && b) = true) : a = true := by
  simp at h
  exact h.1

theorem b_cases (b : Bool) : b = true ∨ b = false := by
  cases b
  · right
    rfl
  · left
    rfl

theorem b_xor_self (b : Bool) : Bool.xor b b = false := by
  cases b <;> rfl

theorem b_true_ne_false : true ≠ false := by
  decide

theorem b_all_pairs : ∀ a b : Bool, (a || b) = (b || a) := by
  intro a b
  match a, b with
  | true, true => rfl
  | true, false => rfl
  | false, true => rfl
  | false, false => rfl

theorem b_if (b : Bool) : (if b then 1 else 2) ≠ 3 := by
  cases b <;> simp

theorem o_some_inj {α : Type} (a b : α) (h : some a = some b) : a = b := by
  injection h

theorem o_some_inj_simp {α : Type} (a b : α) (h : some a = some b) : a = b := by
  simpa using h

theorem o_some_ne_none {α : Type} (a : α) : some a ≠ none := by
  intro h
  cases h

theorem o_map_id {α : Type} (o : Option α) : o.map id = o := by
  cases o <;> rfl

theorem o_map_map {α β γ : Type} (f : α → β) (g : β → γ) (o : Option α) : (o.map f).map g = o.map (g ∘ f) := by
  simp

theorem o_bind_assoc {α : Type} (o : Option α) (f g : α → Option α) : (o.bind f).bind g = o.bind fun x => (f x).bind g := by
  cases o with
  | none => rfl
  | some a => rfl

theorem o_isSome {α : Type} (o : Option α) (h : o.isSome = true) : ∃ a, o = some a := by
  cases o with
  | none => simp at h
  | some a => exact ⟨a, rfl⟩

theorem o_getD {α : Type} (a d : α) : (some a).getD d = a := by
  rfl

theorem o_cases {α : Type} (o : Option α) : o = none ∨ ∃ a, o = some a := by
  exact Option.eq_none_or_eq_some o

theorem l_append_nil {α : Type} (l : List α) : l ++ [] = l := by
  simp

theorem l_append_nil_ind {α : Type} (l : List α) : l ++ [] = l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [List.cons_append, ih]

theorem l_append_assoc {α : Type} (l m n : List α) : l ++ m ++ n = l ++ (m ++ n) := by
  induction l with
  | nil => rfl
  | cons a l ih => simp

theorem l_length_append {α : Type} (l m : List α) : (l ++ m).length = m.length + l.length := by
  rw [List.length_append, Nat.add_comm]

theorem l_length_append_ind {α : Type} (l m : List α) : (l ++ m).length = l.length + m.length := by
  induction l with
  | nil => simp
  | cons a l ih => rw [List.cons_append, List.length_cons, List.length_cons, ih, Nat.add_right_comm]

theorem l_reverse_reverse {α : Type} (l : List α) : l.reverse.reverse = l := by
  simp

theorem l_reverse_append {α : Type} (l m : List α) : (l ++ m).reverse = m.reverse ++ l.reverse := by
  induction l with
  | nil => simp
  | cons a l ih => rw [List.cons_append, List.reverse_cons, ih, List.reverse_cons, List.append_assoc]

theorem l_length_reverse {α : Type} (l : List α) : l.reverse.length = l.length := by
  induction l with
  | nil => rfl
  | cons a l ih => simp

theorem l_map_map {α β γ : Type} (f : α → β) (g : β → γ) (l : List α) : (l.map f).map g = l.map (g ∘ f) := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [List.map_cons, List.map_cons, ih, List.map_cons]; rfl

theorem l_map_length {α β : Type} (f : α → β) (l : List α) : (l.map f).length = l.length := by
  simp

theorem l_map_append {α β : Type} (f : α → β) (l m : List α) : (l ++ m).map f = l.map f ++ m.map f := by
  induction l with
  | nil => rfl
  | cons a l ih => simp

theorem l_mem_head {α : Type} (a : α) (l : List α) : a ∈ a :: l := by
  simp

theorem l_mem_append {α : Type} (a : α) (l m : List α) (h : a ∈ l) : a ∈ l ++ m := by
  simp [h]

theorem l_mem_three (n : Nat) (h : n ∈ [1, 2, 3]) : n < 4 := by
  simp at h
  rcases h with rfl | rfl | rfl <;> decide

theorem l_mem_decide : 3 ∈ [1, 2, 3] ∧ ¬4 ∈ [1, 2, 3] := by
  decide

theorem l_nil_of_length {α : Type} (l : List α) (h : l.length = 0) : l = [] := by
  simpa using h

theorem l_cons_ne_nil {α : Type} (a : α) (l : List α) : a :: l ≠ [] := by
  intro h
  cases h

theorem l_cons_inj {α : Type} (a b : α) (l m : List α) (h : a :: l = b :: m) : l = m := by
  injection h

theorem l_foldr_append (l m : List Nat) : (l ++ m).foldr (· + ·) 0 = l.foldr (· + ·) (m.foldr (· + ·) 0) := by
  simp

theorem l_sum_append (l m : List Nat) : (l ++ m).sum = m.sum + l.sum := by
  rw [List.sum_append, Nat.add_comm]

theorem l_sum_compute : [1, 2, 3, 4].sum = 10 := by
  rfl

theorem l_take_drop {α : Type} (n : Nat) (l : List α) : l.take n ++ l.drop n = l := by
  simp

theorem l_filter_le {α : Type} (p : α → Bool) (l : List α) : (l.filter p).length ≤ l.length := by
  exact List.length_filter_le p l

theorem l_filter_filter_compute : [1, 2, 3, 4, 5, 6].filter (fun n => n % 2 == 0) = [2, 4, 6] := by
  decide

theorem l_replicate_length {α : Type} (n : Nat) (a : α) : (List.replicate n a).length = n := by
  induction n with
  | zero => rfl
  | succ n ih => rw [List.replicate_succ, List.length_cons, ih]

theorem l_all_mem (p : Nat → Bool) (l : List Nat) (h : l.all p = true) (n : Nat) (m : n ∈ l) : p n = true := by
  exact List.all_eq_true.mp h n m

theorem l_append_cancel {α : Type} (l m n : List α) (h : l ++ m = l ++ n) : m = n := by
  simpa using h

theorem l_exists_cons {α : Type} (l : List α) (h : l ≠ []) : ∃ a m, l = a :: m := by
  match l with
  | [] => exact absurd rfl h
  | a :: m => exact ⟨a, m, rfl⟩

theorem l_two_lists {α : Type} (l m : List α) (h : l ++ m = []) : l = [] := by
  simp at h
  exact h.1

theorem p_swap_swap {α β : Type} (p : α × β) : p.swap.swap = p := by
  rfl

theorem p_eta {α β : Type} (p : α × β) : (p.1, p.2) = p := by
  cases p
  rfl
