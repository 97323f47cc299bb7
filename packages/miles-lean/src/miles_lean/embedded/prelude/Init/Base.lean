/-
Operator classes, if-then-else, Nat order, lists, characters and strings: still without notation.
-/
prelude
import Init.Core

set_option linter.defProp false
set_option linter.unusedVariables false

/-! Operators. -/
class HAdd (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hAdd : α → β → γ
class HSub (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hSub : α → β → γ
class HMul (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hMul : α → β → γ
class HDiv (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hDiv : α → β → γ
class HMod (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hMod : α → β → γ
class HPow (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hPow : α → β → γ
class HAppend (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hAppend : α → β → γ
class HOrElse (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hOrElse : α → (Unit → β) → γ
class HAndThen (α : Type u) (β : Type v) (γ : outParam (Type w)) where
  hAndThen : α → (Unit → β) → γ
class Add (α : Type u) where
  add : α → α → α
class Sub (α : Type u) where
  sub : α → α → α
class Mul (α : Type u) where
  mul : α → α → α
class Neg (α : Type u) where
  neg : α → α
class Div (α : Type u) where
  div : α → α → α
class Mod (α : Type u) where
  mod : α → α → α
class Dvd (α : Type u) where
  dvd : α → α → Prop
class Pow (α : Type u) (β : Type v) where
  pow : α → β → α
class NatPow (α : Type u) where
  protected pow : α → Nat → α
class Append (α : Type u) where
  append : α → α → α
class LE (α : Type u) where
  le : α → α → Prop
class LT (α : Type u) where
  lt : α → α → Prop
@[reducible] def GE.ge {α : Type u} [LE α] (a b : α) : Prop := LE.le b a
@[reducible] def GT.gt {α : Type u} [LT α] (a b : α) : Prop := LT.lt b a
class Max (α : Type u) where
  max : α → α → α
export Max (max)
class Min (α : Type u) where
  min : α → α → α
export Min (min)
class BEq (α : Type u) where
  beq : α → α → Bool
class Membership (α : outParam (Type u)) (γ : Type v) where
  mem : γ → α → Prop
class HasEquiv (α : Sort u) where
  Equiv : α → α → Sort v
class EmptyCollection (α : Type u) where
  emptyCollection : α
class Singleton (α : outParam (Type u)) (β : Type v) where
  singleton : α → β
class Insert (α : outParam (Type u)) (γ : Type v) where
  insert : α → γ → γ
class Union (α : Type u) where
  union : α → α → α
class Inter (α : Type u) where
  inter : α → α → α
class SDiff (α : Type u) where
  sdiff : α → α → α
class HasSubset (α : Type u) where
  Subset : α → α → Prop
class Trans.{u, v, w, u_1, u_2, u_3} {α : Sort u_1} {β : Sort u_2} {γ : Sort u_3} (r : α → β → Sort u) (s : β → γ → Sort v) (t : outParam (α → γ → Sort w)) where
  trans : {a : α} → {b : β} → {c : γ} → r a b → s b c → t a c
class Coe (α : semiOutParam (Sort u)) (β : Sort v) where
  coe : α → β
class CoeTC (α : Sort u) (β : Sort v) where
  coe : α → β
class CoeOut (α : Sort u) (β : semiOutParam (Sort v)) where
  coe : α → β
class CoeTail (α : semiOutParam (Sort u)) (β : Sort v) where
  coe : α → β
class CoeHead (α : Sort u) (β : semiOutParam (Sort v)) where
  coe : α → β
class CoeOTC (α : Sort u) (β : Sort v) where
  coe : α → β
class CoeHTC (α : Sort u) (β : Sort v) where
  coe : α → β
class CoeHTCT (α : Sort u) (β : Sort v) where
  coe : α → β
class CoeDep (α : Sort u) (_ : α) (β : Sort v) where
  coe : β
class CoeT (α : Sort u) (_ : α) (β : Sort v) where
  coe : β
class CoeFun (α : Sort u) (γ : outParam (α → Sort v)) where
  coe : (f : α) → γ f
class CoeSort (α : Sort u) (β : outParam (Sort v)) where
  coe : α → β
attribute [coe_decl] CoeTC.coe CoeOTC.coe CoeHTC.coe CoeHTCT.coe CoeT.coe Coe.coe CoeOut.coe CoeTail.coe CoeHead.coe CoeDep.coe CoeFun.coe CoeSort.coe
instance {α : Sort u} {β : Sort v} {γ : Sort w} [Coe β γ] [CoeTC α β] : CoeTC α γ := CoeTC.mk (fun a => Coe.coe (CoeTC.coe a : β))
instance {α : Sort u} {β : Sort v} [Coe α β] : CoeTC α β := CoeTC.mk (fun a => Coe.coe a)
instance {α : Sort u} {β : Sort v} {γ : Sort w} [CoeOut α β] [CoeOTC β γ] : CoeOTC α γ := CoeOTC.mk (fun a => CoeOTC.coe (CoeOut.coe a : β))
instance {α : Sort u} {β : Sort v} [CoeTC α β] : CoeOTC α β := CoeOTC.mk (fun a => CoeTC.coe a)
instance {α : Sort u} {β : Sort v} [CoeOTC α β] : CoeHTC α β := CoeHTC.mk (fun a => CoeOTC.coe a)
instance {α : Sort u} {β : Sort v} [CoeHTC α β] : CoeHTCT α β := CoeHTCT.mk (fun a => CoeHTC.coe a)
instance {α : Sort u} {β : Sort v} (a : α) [CoeHTCT α β] : CoeT α a β := CoeT.mk (CoeHTCT.coe a)
instance {α : Sort u} {β : Sort v} (a : α) [CoeDep α a β] : CoeT α a β := CoeT.mk (CoeDep.coe a)

@[default_instance] instance instHAdd {α : Type u} [Add α] : HAdd α α α := HAdd.mk (fun a b => Add.add a b)
@[default_instance] instance instHSub {α : Type u} [Sub α] : HSub α α α := HSub.mk (fun a b => Sub.sub a b)
@[default_instance] instance instHMul {α : Type u} [Mul α] : HMul α α α := HMul.mk (fun a b => Mul.mul a b)
@[default_instance] instance instHDiv {α : Type u} [Div α] : HDiv α α α := HDiv.mk (fun a b => Div.div a b)
@[default_instance] instance instHMod {α : Type u} [Mod α] : HMod α α α := HMod.mk (fun a b => Mod.mod a b)
@[default_instance] instance instHPow {α : Type u} {β : Type v} [Pow α β] : HPow α β α := HPow.mk (fun a b => Pow.pow a b)
@[default_instance] instance instPowNat {α : Type u} [NatPow α] : Pow α Nat := Pow.mk (fun a b => NatPow.pow a b)
@[default_instance] instance instHAppendOfAppend {α : Type u} [Append α] : HAppend α α α := HAppend.mk (fun a b => Append.append a b)
instance instAddNat : Add Nat := Add.mk Nat.add
instance instMulNat : Mul Nat := Mul.mk Nat.mul
instance instSubNat : Sub Nat := Sub.mk Nat.sub
instance instNatPowNat : NatPow Nat := NatPow.mk Nat.pow

attribute [match_pattern] Add.add HAdd.hAdd Neg.neg

/-! Decisions. -/
@[macro_inline] def ite {α : Sort u} (c : Prop) [h : Decidable c] (t e : α) : α :=
  match h with
  | isTrue _ => t
  | isFalse _ => e
@[macro_inline] def dite {α : Sort u} (c : Prop) [h : Decidable c] (t : c → α) (e : Not c → α) : α :=
  match h with
  | isTrue hc => t hc
  | isFalse hnc => e hnc
instance : Decidable True := isTrue True.intro
instance : Decidable False := isFalse (fun h => h)
@[macro_inline] def Bool.or (x y : Bool) : Bool :=
  match x with
  | true => true
  | false => y
@[macro_inline] def Bool.and (x y : Bool) : Bool :=
  match x with
  | false => false
  | true => y
@[inline] def Bool.not : Bool → Bool
  | true => false
  | false => true
export Bool (or and not)
instance instDecidableAnd {p q : Prop} [dp : Decidable p] [dq : Decidable q] : Decidable (And p q) :=
  match dp with
  | isTrue hp => match dq with
    | isTrue hq => isTrue (And.intro hp hq)
    | isFalse hq => isFalse (fun h => hq (And.right h))
  | isFalse hp => isFalse (fun h => hp (And.left h))
instance instDecidableOr {p q : Prop} [dp : Decidable p] [dq : Decidable q] : Decidable (Or p q) :=
  match dp with
  | isTrue hp => isTrue (Or.inl hp)
  | isFalse hp => match dq with
    | isTrue hq => isTrue (Or.inr hq)
    | isFalse hq => isFalse (fun h => h.elim hp hq)
instance instDecidableNot {p : Prop} [dp : Decidable p] : Decidable (Not p) :=
  match dp with
  | isTrue hp => isFalse (absurd hp)
  | isFalse hp => isTrue hp
instance instDecidableForall {p q : Prop} [dp : Decidable p] [dq : Decidable q] : Decidable (p → q) :=
  match dp with
  | isTrue hp => match dq with
    | isTrue hq => isTrue (fun _ => hq)
    | isFalse hq => isFalse (fun h => hq (h hp))
  | isFalse hp => isTrue (fun h => absurd h hp)
instance instDecidableIff {p q : Prop} [dp : Decidable p] [dq : Decidable q] : Decidable (Iff p q) :=
  match dp with
  | isTrue hp => match dq with
    | isTrue hq => isTrue (Iff.intro (fun _ => hq) (fun _ => hp))
    | isFalse hq => isFalse (fun h => hq (Iff.mp h hp))
  | isFalse hp => match dq with
    | isTrue hq => isFalse (fun h => hp (Iff.mpr h hq))
    | isFalse hq => isTrue (Iff.intro (fun h => absurd h hp) (fun h => absurd h hq))
theorem Bool.ne_false_of_eq_true : {b : Bool} → Eq b true → Not (Eq b false)
  | true, _, h => nomatch h
  | false, h, _ => nomatch h
theorem Bool.ne_true_of_eq_false : {b : Bool} → Eq b false → Not (Eq b true)
  | true, h, _ => nomatch h
  | false, _, h => nomatch h
def Bool.decEq (a b : Bool) : Decidable (Eq a b) :=
  match a, b with
  | false, false => isTrue rfl
  | false, true => isFalse (fun h => nomatch h)
  | true, false => isFalse (fun h => nomatch h)
  | true, true => isTrue rfl
instance : DecidableEq Bool := Bool.decEq
theorem decide_eq_true : {p : Prop} → [inst : Decidable p] → p → Eq (decide p) true
  | _, isTrue _, _ => rfl
  | _, isFalse h₁, h₂ => absurd h₂ h₁
theorem decide_eq_false : {p : Prop} → [inst : Decidable p] → Not p → Eq (decide p) false
  | _, isTrue h₁, h₂ => absurd h₁ h₂
  | _, isFalse _, _ => rfl
theorem of_decide_eq_true {p : Prop} [inst : Decidable p] (h : Eq (decide p) true) : p :=
  match inst, h with
  | isTrue h₁, _ => h₁
  | isFalse _, h => nomatch h
theorem of_decide_eq_false {p : Prop} [inst : Decidable p] (h : Eq (decide p) false) : Not p :=
  match inst, h with
  | isTrue _, h => nomatch h
  | isFalse h₁, _ => h₁
theorem of_decide_eq_self_eq_true {α : Type u} [inst : DecidableEq α] (a : α) : Eq (decide (Eq a a)) true :=
  decide_eq_true rfl
@[inline] instance instBEqOfDecidableEq {α : Type u} [DecidableEq α] : BEq α := BEq.mk (fun a b => decide (Eq a b))
instance : BEq Nat := BEq.mk Nat.beq
@[reducible] def Ne {α : Sort u} (a b : α) : Prop := Not (Eq a b)
instance instDecidableNe {α : Sort u} (a b : α) [DecidableEq α] : Decidable (Ne a b) :=
  match (inferInstance : Decidable (Eq a b)) with
  | isTrue h => isFalse (absurd h)
  | isFalse h => isTrue h
instance instDecidableEqOfIff_bool {b : Bool} : Decidable (Eq b true) := Bool.decEq b true

/-! Order on Nat. -/
protected inductive Nat.le (n : Nat) : Nat → Prop where
  | refl : Nat.le n n
  | step {m} : Nat.le n m → Nat.le n (.succ m)
protected def Nat.lt (n m : Nat) : Prop := Nat.le (.succ n) m
instance instLENat : LE Nat := LE.mk Nat.le
instance instLTNat : LT Nat := LT.mk Nat.lt
theorem Nat.not_succ_le_zero : (n : Nat) → LE.le (Nat.succ n) 0 → False :=
  fun n h => nomatch (h : Nat.le (.succ n) .zero)
theorem Nat.zero_le : (n : Nat) → LE.le 0 n
  | .zero => Nat.le.refl
  | .succ n => Nat.le.step (zero_le n)
theorem Nat.succ_le_succ {n m : Nat} : LE.le n m → LE.le (Nat.succ n) (Nat.succ m) :=
  fun h => (h : Nat.le n m).rec (motive := fun x _ => LE.le (Nat.succ n) (Nat.succ x)) Nat.le.refl (fun _ ih => Nat.le.step ih)
theorem Nat.le_trans {n m k : Nat} : LE.le n m → LE.le m k → LE.le n k :=
  fun h h' => (h' : Nat.le m k).rec (motive := fun x _ => Nat.le n x) h (fun _ ih => Nat.le.step ih)
theorem Nat.le_succ (n : Nat) : LE.le n (.succ n) := Nat.le.step Nat.le.refl
theorem Nat.pred_le : (n : Nat) → LE.le (Nat.pred n) n
  | .zero => Nat.le.refl
  | .succ n => Nat.le_succ n
theorem Nat.pred_le_pred {n m : Nat} (h : LE.le n m) : LE.le (Nat.pred n) (Nat.pred m) :=
  (h : Nat.le n m).rec (motive := fun x _ => LE.le (Nat.pred n) (Nat.pred x)) Nat.le.refl
    (fun {k} _ ih => Nat.le_trans ih (Nat.pred_le k))
theorem Nat.le_of_succ_le_succ {n m : Nat} (h : LE.le (Nat.succ n) (.succ m)) : LE.le n m := pred_le_pred h
theorem Nat.le_of_ble_eq_true : {n m : Nat} → Eq (Nat.ble n m) true → LE.le n m
  | .zero, m, _ => Nat.zero_le m
  | .succ _, .zero, h => nomatch h
  | .succ n, .succ m, h => Nat.succ_le_succ (le_of_ble_eq_true (n := n) (m := m) h)
theorem Nat.ble_eq_true_of_le : {n m : Nat} → LE.le n m → Eq (Nat.ble n m) true
  | .zero, .zero, _ => rfl
  | .zero, .succ _, _ => rfl
  | .succ n, .zero, h => (Nat.not_succ_le_zero n h).elim
  | .succ n, .succ m, h => ble_eq_true_of_le (n := n) (m := m) (Nat.le_of_succ_le_succ h)
theorem Nat.not_le_of_not_ble_eq_true {n m : Nat} (h : Not (Eq (Nat.ble n m) true)) : Not (LE.le n m) :=
  fun h' => h (Nat.ble_eq_true_of_le h')
@[extern "lean_nat_dec_le"] instance Nat.decLe (n m : Nat) : Decidable (LE.le n m) :=
  match h : Nat.ble n m with
  | true => isTrue (Nat.le_of_ble_eq_true h)
  | false => isFalse (Nat.not_le_of_not_ble_eq_true (Bool.ne_true_of_eq_false h))
@[extern "lean_nat_dec_lt"] instance Nat.decLt (n m : Nat) : Decidable (LT.lt n m) := Nat.decLe (.succ n) m
instance : Min Nat := Min.mk (fun n m => ite (LE.le n m) n m)
instance : Max Nat := Max.mk (fun n m => ite (LE.le n m) m n)

/-! Containers. -/
inductive Option (α : Type u) where
  | none : Option α
  | some (val : α) : Option α
attribute [unbox] Option
export Option (none some)
instance {α : Type u} : Inhabited (Option α) := Inhabited.mk none
inductive List (α : Type u) where
  | nil : List α
  | cons (head : α) (tail : List α) : List α
instance {α : Type u} : Inhabited (List α) := Inhabited.mk List.nil
structure Array (α : Type u) where
  mk ::
  toList : List α
attribute [extern "lean_list_to_array_impl"] Array.mk
attribute [extern "lean_array_to_list_impl"] Array.toList
@[extern "lean_mk_empty_array_with_capacity"] def Array.mkEmpty {α : Type u} (c : Nat) : Array α := Array.mk List.nil
def List.concat {α : Type u} : List α → α → List α
  | .nil, b => .cons b .nil
  | .cons a as, b => .cons a (concat as b)
@[extern "lean_array_push"] def Array.push {α : Type u} (a : Array α) (v : α) : Array α := Array.mk (List.concat (Array.toList a) v)
def Array.empty {α : Type u} : Array α := mkEmpty 0
instance {α : Type u} : Inhabited (Array α) := Inhabited.mk Array.empty

/-! Fixed-width numbers, characters, strings. -/
structure Fin (n : Nat) where
  mk ::
  val : Nat
  isLt : LT.lt val n
structure BitVec (w : Nat) where
  ofFin ::
  toFin : Fin (HPow.hPow 2 w)
structure UInt8 where
  ofBitVec ::
  toBitVec : BitVec 8
structure UInt16 where
  ofBitVec ::
  toBitVec : BitVec 16
structure UInt32 where
  ofBitVec ::
  toBitVec : BitVec 32
structure UInt64 where
  ofBitVec ::
  toBitVec : BitVec 64
opaque System.Platform.getNumBits : Unit → Subtype (fun n : Nat => Or (Eq n 32) (Eq n 64)) :=
  fun _ => Subtype.mk 64 (Or.inr rfl)
def System.Platform.numBits : Nat := Subtype.val (getNumBits Unit.unit)
structure USize where
  ofBitVec ::
  toBitVec : BitVec System.Platform.numBits
abbrev UInt32.size : Nat := 4294967296
@[extern "lean_uint32_of_nat"] def UInt32.ofNatLT (n : Nat) (h : LT.lt n (HPow.hPow 2 32)) : UInt32 := UInt32.ofBitVec (BitVec.ofFin (Fin.mk n h))
@[extern "lean_uint64_of_nat"] def UInt64.ofNatLT (n : Nat) (h : LT.lt n (HPow.hPow 2 64)) : UInt64 := UInt64.ofBitVec (BitVec.ofFin (Fin.mk n h))
@[extern "lean_uint32_to_nat"] def UInt32.toNat (n : UInt32) : Nat := n.toBitVec.toFin.val
abbrev Nat.isValidChar (n : Nat) : Prop := Or (LT.lt n 0xd800) (And (LT.lt 0xdfff n) (LT.lt n 0x110000))
structure Char where
  val : UInt32
  valid : Nat.isValidChar val.toNat
theorem Nat.isValidChar.lt_size {n : Nat} (h : n.isValidChar) : LT.lt n (HPow.hPow 2 32) :=
  h.elim (fun h => Nat.le_trans h (Nat.le_of_ble_eq_true (n := 0xd800) (m := 4294967296) rfl))
    (fun h => Nat.le_trans h.right (Nat.le_of_ble_eq_true (n := 0x110000) (m := 4294967296) rfl))
@[extern "lean_uint32_of_nat"] def Char.ofNatAux (n : Nat) (h : n.isValidChar) : Char :=
  Char.mk (UInt32.ofNatLT n h.lt_size) h
@[noinline] def Char.ofNat (n : Nat) : Char :=
  dite n.isValidChar (fun h => Char.ofNatAux n h) (fun _ => Char.ofNatAux 0 (Or.inl (Nat.le_of_ble_eq_true (n := 1) (m := 0xd800) rfl)))
/-- A string is its list of characters; the runtime keeps it as UTF-8. -/
structure String where
  ofList ::
  toList : List Char
attribute [extern "lean_string_mk"] String.ofList
attribute [extern "lean_string_data"] String.toList
instance : Inhabited String := Inhabited.mk ""
