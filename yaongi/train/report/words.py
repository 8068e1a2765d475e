"""The report's words in English and Korean."""

from typing import Literal

Language = Literal["en", "ko"]

_ENGLISH = {"from_step": "gone back to this checkpoint", "skip_batches": "batches left out"}  # of names of events
_KOREAN = {
    "active": "활성",
    "AdamW": "AdamW",
    "answers that end by themselves, %": "스스로 끝난 답변, %",
    "bits per byte of held-out text": "검증 텍스트의 바이트당 비트",
    "changed": "바뀐 설정",
    "checkpoint": "체크포인트",
    "command": "명령",
    "commit": "커밋",
    "device": "장치",
    "epochs": "반복 횟수",
    "expert": "전문가",
    "experts' load, 1 = fair": "전문가별 부하, 1 = 균등",
    "from_step": "이 체크포인트로 되돌아감",
    "gradient norm": "기울기 크기",
    "hosts": "호스트",
    "hours": "시간",
    "kernels: share of the roofline": "커널: 루프라인 대비",
    "kernels: × the fastest peer": "커널: 가장 빠른 비교 대상 대비 배율",
    "learning rate": "학습률",
    "length of answers, tokens": "답변의 길이, 토큰",
    "loss spike": "손실 급등",
    "loss, nats per token": "손실, 토큰당 nat",
    "machine": "컴퓨터",
    "margin of the right answer, nats": "정답의 여유, nat",
    "matrices": "행렬",
    "mean": "평균",
    "memory, GB": "메모리, GB",
    "million tokens": "백만 토큰",
    "micro-batches of a step by rank, ms": "한 스텝의 마이크로배치, 프로세스별 ms",
    "model TFLOP/s": "모델 TFLOP/s",
    "model": "모델",
    "MoE layer": "MoE 층",
    "most casts of a step that saturated": "한 스텝에서 포화된 변환의 최대 비율",
    "no evaluation was recorded": "기록된 평가가 없습니다",
    "no samples were drawn": "생성된 예문이 없습니다",
    "pairs told apart, %": "구별한 쌍, %",
    "parameters": "파라미터",
    "per cent right": "정답률, %",
    "PFLOP": "PFLOP",
    "precision": "정밀도",
    "rows": "행",
    "Samples": "생성 예문",
    "Settings": "설정",
    "share of the text": "텍스트 비율",
    "skip_batches": "건너뛴 배치",
    "skipped step": "건너뛴 스텝",
    "skipped steps, spikes": "건너뛴 스텝, 손실 급등",
    "source": "출처",
    "speed at the end": "마지막 속도",
    "starts from": "출발점",
    "step": "스텝",
    "steps": "스텝",
    "Text": "텍스트",
    "the run's curves": "학습 곡선",
    "time": "시간",
    "tokens": "토큰",
    "tokens/s": "토큰/초",
    "trained": "학습",
    "variation of the experts' load, σ / mean": "전문가 부하의 변동, σ / 평균",
    "versions": "버전",
    "waiting for data, % of the time": "데이터 대기, 시간의 %",
    "without fp8": "fp8 없이",
}


def translate(text: str, language: Language) -> str:
    """Return a phrase of the report in a language; English is the phrase itself.

    Raises:
        KeyError: the table has no such phrase.
    """
    return _ENGLISH.get(text, text) if language == "en" else _KOREAN[text]
